"""Dynamic SplitFuse: what a step takes, who gives up blocks, and that a request's tokens depend on none of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.engine import RaggedEngine, SchedulingError, SplitFuse
from shared.sampling_params import SamplingParams
from tests.shared.engine.ragged import ragged_engine, some_tokens, wide

MakeModel = Callable[[str], Path]


def greedy(max_tokens: int, **values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, temperature=0, **values)


class Watched(SplitFuse):
    """With the batches that were put: uids with numbers of tokens."""

    def __init__(self, engine: RaggedEngine, **options: Any) -> None:
        super().__init__(engine, **options)
        self.batches: list[dict[int, int]] = []
        put = engine.put

        def watched(uids: list[int], tokens: list[list[int]]) -> torch.Tensor:
            self.batches.append(dict(zip(uids, map(len, tokens), strict=True)))
            return put(uids, tokens)

        engine.put = watched  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def model(tiny_model: MakeModel) -> Path:
    return tiny_model("llama")


def test_decoding_goes_first_and_prompts_fill_the_step_in_their_order(model: Path) -> None:
    engine = ragged_engine(model, num_blocks=40, limits=wide(max_ragged_batch_size=16, max_ragged_sequence_count=3))
    scheduler = Watched(engine)
    for length in (4, 30, 5, 2):
        scheduler.submit(some_tokens(length), greedy(4))
    assert all(len(request.generated) == 4 for request in scheduler.run())
    assert scheduler.batches[:4] == [
        {0: 4, 1: 12},
        {0: 1, 1: 15},
        {0: 1, 1: 3, 2: 5},  # the last one waits for a place
        {0: 1, 1: 1, 2: 1},
    ]
    assert all(sum(batch.values()) <= 16 and len(batch) <= 3 for batch in scheduler.batches)


def test_a_prompt_begins_once_all_of_it_fits_and_nobody_passes_it(model: Path) -> None:
    engine = ragged_engine(model, num_blocks=5, limits=wide(max_ragged_batch_size=8, max_ragged_sequence_count=8))
    scheduler = Watched(engine)
    for length, max_tokens in ((8, 9), (24, 1), (1, 1)):
        scheduler.submit(some_tokens(length), greedy(max_tokens))
    ended = [request.uid for request in scheduler.run()]
    # the first holds a block and then two of five, and one is kept for it to grow by: three are free, four are wanted
    assert ended == [0, 1, 2]
    assert scheduler.batches[:9] == [{0: 8}, *[{0: 1}] * 8]
    assert scheduler.batches[9:] == [{1: 8}, {1: 8}, {1: 8}, {2: 1}]


def expected_tokens(model: Path, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """Each alone, in one piece."""
    engine, alone = ragged_engine(model, num_blocks=200, limits=wide()), []
    for prompt, own in zip(prompts, params, strict=True):
        scheduler = SplitFuse(engine, eos_token_ids=(2,))
        scheduler.submit(prompt, own)
        alone += [request.generated for request in scheduler.run()]
    return alone


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("num_blocks", [10, 14, 60])
def test_tokens_do_not_depend_on_the_room_that_there_is(model: Path, num_blocks: int, offload: bool) -> None:
    rng = random.Random(3)
    prompts = [some_tokens(rng.choice((1, 7, 8, 9, 20, 33)), seed) for seed in range(12)]
    kinds = ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.2, "repetition_penalty": 1.3})
    params = [SamplingParams(max_tokens=rng.choice((9, 40)), seed=i, logprobs=2, **kinds[i % 3]) for i in range(12)]
    limits = wide(max_ragged_batch_size=20, max_ragged_sequence_count=6, offload=offload)
    engine = ragged_engine(model, num_blocks=num_blocks, limits=limits)
    scheduler = SplitFuse(engine, eos_token_ids=(2,))
    uids = [scheduler.submit(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    requests = {request.uid: request for request in scheduler.run()}
    assert [requests[uid].generated for uid in uids] == expected_tokens(model, prompts, params)
    assert all(len(request.output[0].top) == 2 for request in requests.values())
    assert (scheduler.given_up > 0) == (num_blocks < 60)
    assert (engine.free_blocks, len(engine.sequences), engine._swap.used_bytes) == (num_blocks, 0, 0)


def test_greedy_tokens_are_those_of_transformers(model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    engine = ragged_engine(model, num_blocks=60, limits=wide(max_ragged_batch_size=16, max_ragged_sequence_count=8))
    scheduler = SplitFuse(engine)
    prompts = [some_tokens(length) for length in (3, 40, 11)]
    uids = [scheduler.submit(prompt, greedy(16)) for prompt in prompts]
    generated = {request.uid: request.generated for request in scheduler.run()}
    for uid, prompt in zip(uids, prompts, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert generated[uid] == expected[0, len(prompt) :].tolist()


def test_a_request_goes_on_in_another_engine(model: Path) -> None:
    here = SplitFuse(ragged_engine(model, num_blocks=30, limits=wide()))
    there = SplitFuse(ragged_engine(model, num_blocks=30, block_tokens=16, limits=wide()))
    params = [SamplingParams(max_tokens=20, seed=seed, repetition_penalty=1.2) for seed in range(3)]
    prompts = [some_tokens(length) for length in (9, 20, 4)]
    uids = [here.submit(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    waiting = here.submit(some_tokens(2), greedy(3))
    for _ in range(5):
        here.step()
    here.cancel(uids[2])
    moved = there.take_over(*here.hand_over(uids[1]))
    fresh = SplitFuse(ragged_engine(model, num_blocks=30, limits=wide()))
    fresh.submit(some_tokens(2), greedy(3))
    not_begun = there.take_over(*fresh.hand_over(0))
    ended = {("here", r.uid): r.generated for r in here.run()} | {("there", r.uid): r.generated for r in there.run()}
    alone = expected_tokens(model, [*prompts, some_tokens(2)], [*params, greedy(3)])
    assert ended[("here", uids[0])] == alone[0]
    assert ended[("there", moved)] == alone[1]
    assert ended.get(("here", waiting), alone[3]) == ended[("there", not_begun)] == alone[3]
    assert ("here", uids[2]) not in ended


@pytest.mark.parametrize(
    ("tokens", "values", "message"),
    [
        ([], {}, "tokens: wants one at least, each from 0 to 383"),
        ([384], {}, "tokens: wants one at least"),
        ([5], {"temperature": -1.0}, "temperature: must be 0"),
        ([5], {"n": 2}, "n, stop, prompt_logprobs: the service has them"),
        ([5] * 30, {"max_tokens": 11}, r"max_tokens: 30 tokens and 11 more are over max_context \(40\), or over the 9"),
        ([5] * 30, {"max_tokens": 10, "blocks": 4}, "or over the 4 blocks of 8"),
    ],
)
def test_what_can_never_be_computed_is_refused_at_once(
    model: Path, tokens: list[int], values: dict[str, Any], message: str
) -> None:
    scheduler = SplitFuse(ragged_engine(model, num_blocks=values.pop("blocks", 9)))
    with pytest.raises(ValueError, match=message):
        scheduler.submit(tokens, SamplingParams(**{"max_tokens": 3, "seed": 0, **values}))
    assert [*scheduler.run()] == []


def test_blocks_that_others_hold_are_not_waited_for(model: Path) -> None:
    engine = ragged_engine(model, num_blocks=9)
    engine.put([100], [some_tokens(24)])
    engine.put([101], [some_tokens(24)])
    scheduler = SplitFuse(engine)
    scheduler.submit(some_tokens(30), greedy(2))
    with pytest.raises(SchedulingError, match="KVCacheLimitExceeded"):
        [*scheduler.run()]
    engine.flush(101)
    assert [len(request.generated) for request in scheduler.run()] == [2]
    for uid in (102, 103, 104):
        engine.put([uid], [[5]])
    scheduler.submit([5], greedy(2))
    with pytest.raises(SchedulingError, match="EngineSequenceLimitExceeded"):
        scheduler.step()
    assert [sequence.uid for sequence in engine.sequences] == [100, 102, 103, 104]


def test_a_row_without_a_distribution_ends_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ragged_engine(model, num_blocks=30, limits=wide())
    scheduler = SplitFuse(engine)
    uids = [scheduler.submit(some_tokens(4, seed), greedy(3)) for seed in range(3)]
    put = engine.put

    def broken(*args: Any) -> torch.Tensor:
        logits = put(*args)
        logits[1] = float("nan")
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine, "put", broken)
        [failed] = scheduler.step()
    assert (failed.uid, failed.generated, type(failed.error).__name__) == (uids[1], [], "InvalidLogits")
    others = {request.uid: request.generated for request in scheduler.run()}
    assert others.keys() == {uids[0], uids[2]}
    assert others[uids[2]] == expected_tokens(model, [some_tokens(4, 2)], [greedy(3)])[0]
