"""The engine in Triton: logits near those of the C ops, and steps that draw what the sampler draws."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import device
from shared.batch import BatchEntry
from shared.config import load_config
from shared.engine import Engine, EnginePlan
from shared.model_store import ModelStore
from shared.penalties import SampleRow
from shared.sampling import sample
from shared.sampling_params import SamplingParams

BLOCK_TOKENS = 16
PROMPTS = [[5, 6, 7] * 11, [9] * 16, [300], [17, 4, 90, 2, 17]]
PLAIN = {"max_tokens": 100, "seed": 11}
SAMPLINGS = [
    SamplingParams(**PLAIN, temperature=0),
    SamplingParams(**PLAIN, temperature=0.9, top_p=0.8, top_k=40),
    SamplingParams(**PLAIN, temperature=1.2, min_p=0.01, repetition_penalty=1.3, frequency_penalty=0.4),
    SamplingParams(**PLAIN, temperature=0, presence_penalty=1.5),
]


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def make_engine(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Callable[..., Engine]:
    """Engines of one tiny model: by Triton, or in C."""

    def make(family: str = "qwen3", *, triton: bool = True, dtype: str = "bfloat16", **changes: object) -> Engine:
        overrides = {"model": str(tiny_model(family)), "dtype": dtype, "decode": {"num_blocks": 32, "max_running": 4}}
        config = load_config(None, overrides)
        plan = EnginePlan.of(config, config.decode, ModelStore().resolve(config.model))
        on = request.param if triton else "c"
        if on == "interpreted":
            request.getfixturevalue("interpreter")
        elif device.INTERPRETED:
            raise AssertionError("an engine in C comes before those that are interpreted")
        return Engine(replace(plan, device="cuda" if on == "cuda" else "cpu", **changes))

    return make


def blocks_of(row: int) -> list[int]:
    return list(range(1 + 4 * row, 5 + 4 * row))


def prefill(engine: Engine, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    return engine.forward([BatchEntry(prompt, 0, blocks_of(row)) for row, prompt in enumerate(prompts)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", ["mistral", "qwen3", "gemma2", "bloom", "qwen2_moe", "gptj", "olmo2", "stablelm-parallel", "mpt"]
)
def test_logits_are_near_those_of_the_c_ops(make_engine: Callable[..., Engine], family: str, dtype: str) -> None:
    in_c = make_engine(family, triton=False, dtype=dtype)
    expected = [prefill(in_c, PROMPTS), in_c.forward([BatchEntry([3], len(PROMPTS[0]), blocks_of(0))])]
    expected = [logits.clone() for logits in expected]
    engine = make_engine(family, dtype=dtype)
    got = [prefill(engine, PROMPTS), engine.forward([BatchEntry([3], len(PROMPTS[0]), blocks_of(0))])]
    for logits, wanted in zip(got, expected, strict=True):
        tolerance = 2e-5 if dtype == "float32" else 0.05
        torch.testing.assert_close(logits.cpu(), wanted, atol=tolerance * float(wanted.abs().amax()), rtol=0)


def test_a_step_has_the_bits_of_the_prompt_and_draws_what_the_sampler_draws(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("mistral")
    prompt = PROMPTS[0]
    [alone] = prefill(engine, [prompt]).clone()
    engine.forward([BatchEntry(prompt[:-1], 0, blocks_of(1), "none")])
    row = SampleRow.from_tokens(SAMPLINGS[1], prompt, len(prompt))
    tokens, logits = engine.step([BatchEntry([prompt[-1]], len(prompt) - 1, blocks_of(1))], [row])
    assert torch.equal(logits[0], alone)
    assert tokens == [sample(alone[None], [row])[0].token_id]


@pytest.mark.slow
def test_a_prompt_has_the_same_bits_in_chunks_beside_others_and_step_by_step(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine("mistral")
    prompt = PROMPTS[0]
    alone = prefill(engine, [prompt]).clone()
    beside = engine.forward([BatchEntry(PROMPTS[1], 0, blocks_of(1)), BatchEntry(prompt, 0, blocks_of(2))])
    assert torch.equal(beside[1], alone[0])
    engine.forward([BatchEntry(prompt[:17], 0, blocks_of(3), "none")])
    chunked = engine.forward([BatchEntry(prompt[17:], 17, blocks_of(3))])
    assert torch.equal(chunked[0], alone[0])
    engine.forward([BatchEntry(prompt[:31], 0, blocks_of(4), "none")])
    for position in (31, 32):
        # by itself and with another, which is another bucket
        single = engine.forward([BatchEntry([prompt[position]], position, blocks_of(4))]).clone()
        pair = [BatchEntry([1], 5, blocks_of(5)), BatchEntry([prompt[position]], position, blocks_of(4))]
        assert torch.equal(engine.forward(pair)[1], single[0])
    assert torch.equal(single[0], alone[0])


@pytest.mark.slow
def test_steps_draw_what_the_sampler_draws(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    prefill(engine, PROMPTS)
    histories = [list(prompt) for prompt in PROMPTS]
    rows = [
        SampleRow.from_tokens(params, prompt, len(prompt)) for params, prompt in zip(SAMPLINGS, PROMPTS, strict=True)
    ]
    for step in range(6):
        # one sits out some steps, and its counts are there again when it is back
        members = [row for row in range(4) if not (row == 2 and step in (2, 3))]
        entries = [BatchEntry([histories[row][-1]], len(histories[row]) - 1, blocks_of(row)) for row in members]
        asked = [rows[row] for row in members]
        tokens, _ = engine.step(entries, asked)
        raw = engine.forward(entries).clone()  # the step's own may have penalties in them
        expected = [sampled.token_id for sampled in sample(raw, asked)]
        assert tokens == expected
        for row, token in zip(members, expected, strict=True):
            histories[row].append(token)
            history = rows[row].history
            if history is not None:
                history.append(token)
            rows[row] = replace(rows[row], position=rows[row].position + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("make_engine", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    "family", ["mistral", "qwen3", "gemma2", "bloom", "qwen2_moe", "gptj", "olmo2", "stablelm-parallel", "mpt"]
)
def test_replays_have_the_bits_of_ops_launched_one_by_one(make_engine: Callable[..., Engine], family: str) -> None:
    """Steps of sequences that come, sit out and grow, in any order and in buckets that they fill or do not."""
    engines = [make_engine(family, enable_cuda_graph=replayed) for replayed in (True, False)]
    for engine in engines:
        engine.warm_up()
        prefill(engine, PROMPTS)
    rng = random.Random(0)
    histories = [list(prompt) for prompt in PROMPTS]
    while any(len(history) < 4 * BLOCK_TOKENS for history in histories):
        alive = [row for row in range(4) if len(histories[row]) < 4 * BLOCK_TOKENS]
        members = rng.sample(alive, rng.randint(1, len(alive)))
        entries = [BatchEntry([histories[row][-1]], len(histories[row]) - 1, blocks_of(row)) for row in members]
        drawn = []
        for engine in engines:
            asked = [
                SampleRow.from_tokens(SAMPLINGS[row], histories[row], len(PROMPTS[row]), index=row) for row in members
            ]
            tokens, logits = engine.step(entries, asked)
            drawn.append((tokens, logits.clone()))
        (tokens, logits), (expected, expected_logits) = drawn
        assert tokens == expected
        assert torch.equal(logits, expected_logits)
        for row, token in zip(members, tokens, strict=True):
            assert token is not None
            histories[row].append(token)


@pytest.mark.slow
def test_rows_that_report_or_edit_are_left_to_the_sampler(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    prefill(engine, PROMPTS)
    entries = [BatchEntry([prompt[-1]], len(prompt) - 1, blocks_of(row)) for row, prompt in enumerate(PROMPTS)]
    kinds = [
        SamplingParams(**PLAIN, temperature=0, logprobs=2),
        SamplingParams(**PLAIN, temperature=0, logit_bias=((3, 100.0),)),
        SamplingParams(**PLAIN, temperature=0, min_tokens=4),
        SamplingParams(**PLAIN, temperature=0),
    ]
    raw = engine.forward(entries).clone()
    tokens, logits = engine.step(entries, [SampleRow(params, 0) for params in kinds])
    assert tokens[:3] == [None, None, None]
    assert tokens[3] == int(raw[3].argmax())
    assert torch.equal(logits, raw)


@pytest.mark.slow
def test_a_slot_goes_to_who_comes_when_all_are_taken(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    prefill(engine, PROMPTS)
    params = SamplingParams(**PLAIN, temperature=0, repetition_penalty=5.0)
    entry = BatchEntry([7], 32, blocks_of(0))
    raw = engine.forward([entry]).clone()
    rows = [SampleRow.from_tokens(params, [i, i + 1, 7], 3) for i in range(12)]  # three times the slots there are
    for row in (*rows, *rows):
        tokens, _ = engine.step([entry], [row])
        assert tokens == [sample(raw, [row])[0].token_id]


@pytest.mark.slow
def test_a_step_ahead_begins_with_what_the_one_before_draws(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    rows = [
        SampleRow.from_tokens(params, prompt, len(prompt)) for params, prompt in zip(SAMPLINGS, PROMPTS, strict=True)
    ]
    lengths = [len(prompt) for prompt in PROMPTS]

    def entries(step: int, last: Sequence[int], members: Sequence[int]) -> list[BatchEntry]:
        return [BatchEntry([last[row]], lengths[row] - 1 + step, blocks_of(row)) for row in members]

    def asked(step: int, members: Sequence[int], pending: int) -> list[SampleRow]:
        return [replace(rows[row], position=step, pending=pending) for row in members]

    def restart() -> list[int]:
        prefill(engine, PROMPTS)
        return [prompt[-1] for prompt in PROMPTS]

    # ahead: the second step leaves one out and has another order, and so does the third
    orders = [[0, 1, 2, 3], [2, 0, 3], [3, 2]]
    last = restart()
    waits = []
    for step, members in enumerate(orders):
        sources = [-1] * 4 if not step else [orders[step - 1].index(row) for row in members]
        given = entries(step, last if not step else [0] * 4, members)
        assert engine.launch is not None
        waits.append(engine.launch(given, asked(step, members, step), sources))
        if step:  # the tokens of the one before are asked for when the next has begun
            waits[step - 1] = waits[step - 1]()
    waits[-1] = waits[-1]()

    last = restart()
    for params, prompt, row in zip(SAMPLINGS, PROMPTS, range(4), strict=True):
        rows[row] = SampleRow.from_tokens(params, prompt, len(prompt))
    for step, members in enumerate(orders):
        drawn, _ = engine.step(entries(step, last, members), asked(step, members, 0))
        assert drawn == waits[step]
        for row, token in zip(members, drawn, strict=True):
            assert token is not None
            last[row] = token
            history = rows[row].history
            if history is not None:
                history.append(token)


@pytest.mark.slow
def test_a_row_that_reports_or_edits_is_not_begun_ahead(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    row = SampleRow(SamplingParams(**PLAIN, temperature=0, logprobs=0), 0)
    assert engine.launch is not None
    assert engine.launch([BatchEntry([1], 0, [1])], [row], [-1]) is None


OPS_OF_A_STEP = (
    "activation", "add", "embedding", "gather", "head_norm", "layer_norm", "linear", "moe", "rms_norm", "scale",
)  # fmt: skip


def test_no_step_waits_for_the_device_but_for_its_tokens() -> None:
    """What a decode step runs through has no copy to the host and no wait, but for the tokens' own."""
    root = Path(__file__).resolve().parents[2]
    files = [*(root / "kernels/cuda").glob("*.py"), root / "kernels/feed.py", root / "kernels/penalties.py"]
    files += [root / f"kernels/{op}.py" for op in OPS_OF_A_STEP]
    files += [
        root / f"shared/{name}.py" for name in ("cuda_graphs", "models/decoder", "models/transformer", "workspace")
    ]
    waits = re.compile(r"synchronize\(|\.(item|tolist|cpu|numpy)\(|\.to\(.cpu")
    found = {
        f"{path.relative_to(root)}: {line.strip()}"
        for path in files
        for line in path.read_text().splitlines()
        if waits.search(line)
    }
    assert found == {
        "shared/cuda_graphs.py: self._done[turn].synchronize()  # for that step alone, without Python's lock",
        "shared/cuda_graphs.py: return self._drawn[turn][:num_rows].tolist()",
    }
