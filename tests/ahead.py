"""An engine that tells a step's tokens only when the next one has been begun, as one does that works on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kernels.sampling import draw, token_uniforms
from shared.batch import BatchEntry
from shared.engine import Engine
from shared.penalties import SampleRow, edit_logits
from shared.sampling import how_of


class AheadEngine(Engine):
    """Another engine's model and pool. Its steps are computed when they are begun, by C ops and the sampler."""

    def __init__(self, engine: Engine) -> None:
        self.__dict__.update(engine.__dict__)
        self.at_once = engine
        self.launch = self._launch
        self.num_launched = self.num_fed = self.num_waiting = 0
        self._drawn: list[int] = []

    def _launch(
        self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow], sources: Sequence[int]
    ) -> Callable[[], list[int]] | None:
        if any(row.params.logprobs is not None or row.params.penalized for row in rows):
            return None
        assert self.num_waiting <= 1, "a step's tokens were not asked for before the next but one"
        begun = []
        for entry, source in zip(entries, sources, strict=True):
            token_ids = entry.token_ids if source < 0 else [max(self._drawn[source], 0)]
            begun.append(BatchEntry(token_ids, entry.start_position, entry.block_table))
        uniforms = token_uniforms((r.params.seed for r in rows), (r.index for r in rows), (r.position for r in rows))
        drawn = draw(edit_logits(self.forward(begun), rows), how_of(rows), uniforms)
        self._drawn = drawn
        self.num_launched += 1
        self.num_fed += sum(source >= 0 for source in sources)
        self.num_waiting += 1

        def wait() -> list[int]:
            self.num_waiting -= 1
            return drawn

        return wait
