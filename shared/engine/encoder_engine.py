"""The engine of a model that embeds: vectors of ragged batches of texts. It schedules nothing.

engine = EncoderEngine(plan, plan.pooling)                # loads the weights
vectors = engine.encode([[101, 7592, 102], [101, 102]])
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from shared.engine.engine import load_plan
from shared.engine.plan import EnginePlan
from shared.models.encoder import Encoder
from shared.pooling import Pooling

_LENGTHS = (1, 16, 64, 512)  # of texts that between them take every tile


class EncoderEngine:
    """A loaded model. One thread at a time."""

    def __init__(self, plan: EnginePlan, pooling: Pooling) -> None:
        """Raises CheckpointError."""
        self.plan = plan
        self.use_thread()
        self._pooling = pooling
        self._encoder = Encoder(plan.architecture, load_plan(plan), deterministic=plan.deterministic)

    def use_thread(self) -> None:
        """Called once on each thread that computes: torch counts threads for each thread that calls it."""
        torch.set_num_threads(self.plan.num_threads)

    def warm_up(self) -> None:
        """Computes texts of each kind: no request waits for a compiler."""
        for length in _LENGTHS:
            self.encode([[0] * min(length, self.plan.max_context)])

    @torch.inference_mode()
    def encode(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """A vector for each text, float32 [texts, hidden]; its bits are those that it has alone."""
        device = self._encoder.device
        ends = list(itertools.accumulate(map(len, texts), initial=0))
        hidden = self._encoder.forward(
            torch.tensor(list(itertools.chain.from_iterable(texts)), dtype=torch.int64, device=device),
            torch.tensor(ends, dtype=torch.int32, device=device),
            max_seqlen=max(map(len, texts)),
        )
        if self._pooling.mode == "cls":
            return hidden[torch.tensor(ends[:-1], device=device)].float().cpu()
        # each by itself: a sum over parts of one tensor might be cut by what lies beside them
        means = [hidden[start:end].float().mean(0) for start, end in itertools.pairwise(ends)]
        return torch.stack(means).cpu()

    @property
    def workspace_bytes(self) -> int:
        """Of the activations of texts, which all layers share."""
        return self._encoder.workspace_bytes

    @property
    def description(self) -> str:
        """What it computes with, for logs."""
        if self.plan.device == "cuda":
            return f"Triton on {torch.cuda.get_device_name()}"
        triton = in_triton("the engine", torch.empty(0))
        return "Triton's interpreter" if triton else library.instruction_set()

    def close(self) -> None:
        """Lets go of the weights."""
        self._encoder.close()
