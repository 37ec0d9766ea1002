"""The ragged engine: what it takes and refuses, and that splitting, swapping and moving change no bit."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.engine import RaggedEngine, SchedulingError, SchedulingResult, ragged_engine, ragged_memory
from shared.engine.scheduling_result import SchedulingResult as R
from shared.model_files import ModelError
from tests.shared.engine.ragged import LIMITS, some_tokens, wide
from tests.shared.engine.ragged import ragged_engine as make_engine
from tests.tiny_encoders import tiny_encoder

MakeModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def shared_engine(tiny_model: MakeModel) -> RaggedEngine:
    return make_engine(tiny_model("llama"))


@pytest.fixture
def engine(shared_engine: RaggedEngine) -> Iterator[RaggedEngine]:
    """Small limits: 9 blocks of 8 tokens, 4 sequences tracked, 3 of them and 24 tokens in a batch, 40 in a context."""
    yield shared_engine
    for sequence in shared_engine.sequences:
        shared_engine.flush(sequence.uid)
    assert shared_engine.free_blocks == 9


def snapshot(engine: RaggedEngine) -> list[Any]:
    """All that a caller can see of its sequences."""
    return [
        engine.free_blocks,
        [(s.uid, list(s.blocks), s.seen_tokens, s.in_flight_tokens, s.saved) for s in engine.sequences],
        [(engine.query(uid, 30, 9), engine.get_remaining_block_capacity(uid)) for uid in range(6)],
    ]


# -- what comes of tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "kv_dtype"), [("llama", "float32"), ("mistral", "float32"), ("qwen3", "int8")])
def test_logits_are_the_same_bits_however_the_tokens_are_split(tiny_model: MakeModel, kind: str, kv_dtype: str) -> None:
    engine = make_engine(tiny_model(kind), num_blocks=64, limits=wide(), kv_dtype=kv_dtype)
    histories = {uid: some_tokens(length, uid) for uid, length in enumerate((1, 8, 17, 40, 63))}
    whole = {uid: engine.put([uid], [tokens])[0] for uid, tokens in histories.items()}
    for uid in histories:
        engine.flush(uid)
    together = engine.put([*histories], [*histories.values()])
    assert all(torch.equal(together[row], whole[uid]) for row, uid in enumerate(histories))
    for uid in histories:
        engine.flush(uid)
    # prompts in chunks beside sequences that decode
    rng, left = random.Random(3), {uid: list(tokens) for uid, tokens in histories.items()}
    last: dict[int, torch.Tensor] = {}
    while any(left.values()):
        uids = rng.sample(
            [uid for uid, tokens in left.items() if tokens], k=1 + rng.randrange(sum(map(bool, left.values())))
        )
        parts = [left[uid][: rng.choice((1, 1, 3, 9))] for uid in uids]
        for uid, part, logits in zip(uids, parts, engine.put(uids, parts), strict=True):
            last[uid], left[uid] = logits, left[uid][len(part) :]
    assert all(torch.equal(last[uid], whole[uid]) for uid in histories)


@pytest.mark.parametrize("in_memory", [False, True])
def test_logits_are_those_of_transformers(tiny_model: MakeModel, in_memory: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    engine = make_engine(model if in_memory else tiny_model("llama"), num_blocks=32, limits=wide())
    prompts = [some_tokens(19), some_tokens(5), some_tokens(33)]
    logits = engine.put([5, 1, 3], [torch.tensor(prompt) for prompt in prompts])
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


def test_logits_are_the_callers(engine: RaggedEngine) -> None:
    first = engine.put([1], [[5]])
    kept = first.clone()
    engine.put([2], [[6]])
    assert torch.equal(first, kept)


def test_uids_lengths_and_tokens_may_be_tensors(engine: RaggedEngine) -> None:
    tokens = [torch.tensor([[5, 6]]), torch.tensor([7], dtype=torch.int32)]
    uids = torch.tensor([1, 2])
    assert engine.can_schedule(uids, torch.tensor([2, 1])) is R.Success
    logits = engine.put(uids, tokens)
    assert [sequence.uid for sequence in engine.sequences] == [1, 2]
    assert torch.equal(engine.put([3], [[5, 6]]), logits[:1])


def test_an_empty_batch_has_no_logits(engine: RaggedEngine) -> None:
    assert engine.put([], []).shape == (0, engine.plan.architecture.vocab_size)


# -- limits -----------------------------------------------------------------------------------------------------------


LIMIT_CASES = [
    (R.BatchSequenceLimitExceeded, [(1, 1), (2, 1), (3, 1), (4, 1)], [], RuntimeError, "due to sequence limit: 3"),
    (R.BatchTokenLimitExceeded, [(1, 12), (2, 13)], [], RuntimeError, "due to capacity limit: 24"),
    (R.KVCacheLimitExceeded, [(8, 1), (9, 17)], [(8, 24), (9, 23)], SchedulingError, "KVCacheLimitExceeded"),
    (R.SequenceTokenLimitExceeded, [(7, 17)], [(7, 24)], SchedulingError, "SequenceTokenLimitExceeded"),
    (R.EngineSequenceLimitExceeded, [(1, 1)], [(5, 1), (6, 1), (7, 1), (8, 1)], RuntimeError, "tracking slot for"),
    (R.Success, [(7, 16)], [(7, 24)], None, ""),
]


@pytest.mark.parametrize(("result", "batch", "before", "unchecked", "message"), LIMIT_CASES)
def test_every_scheduling_result_and_nothing_changes(
    tiny_model: MakeModel, engine: RaggedEngine, result: R, batch: Any, before: Any, unchecked: Any, message: str
) -> None:
    for uid, length in before:
        engine.put([uid], [some_tokens(length)])
    if result is R.KVCacheLimitExceeded:
        engine.put([7], [some_tokens(16)])  # 3 + 3 + 2 of 9 blocks: one is free, and 3 are wanted
    uids, lengths = [uid for uid, _ in batch], [length for _, length in batch]
    tokens = [some_tokens(length) for length in lengths]
    assert engine.can_schedule(uids, lengths) is result
    if result is R.Success:
        engine.put(uids, tokens)
        return
    seen = snapshot(engine)
    with pytest.raises(
        SchedulingError, match=f"Batch scheduling failed with result SchedulingResult.{result.name}"
    ) as e:
        engine.put(uids, tokens)
    assert e.value.result is result
    with pytest.raises(unchecked, match=message):
        engine.put(uids, tokens, do_checks=False)
    assert snapshot(engine) == seen


def test_results_have_deepspeeds_values() -> None:
    assert {result.name: result.value for result in SchedulingResult} == {
        "Success": 0,
        "EngineSequenceLimitExceeded": 1,
        "BatchSequenceLimitExceeded": 2,
        "BatchTokenLimitExceeded": 3,
        "KVCacheLimitExceeded": 4,
        "SequenceTokenLimitExceeded": 5,
    }


def test_of_several_limits_the_first_in_deepspeeds_order_is_told(engine: RaggedEngine) -> None:
    too_many = [1, 2, 3, 4]
    assert engine.can_schedule(too_many, [100] * 4) is R.BatchSequenceLimitExceeded
    assert engine.can_schedule([1, 2], [40, 40]) is R.KVCacheLimitExceeded  # 80 tokens are too many, too
    for uid in (5, 6, 7, 8):
        engine.put([uid], [[3]])
    assert engine.can_schedule([1], [25]) is R.EngineSequenceLimitExceeded
    assert engine.can_schedule([1, 2], [24, 24]) is R.KVCacheLimitExceeded


@pytest.mark.parametrize(
    ("uids", "tokens", "message"),
    [
        ([1, 2, 1], [[3], [4], [5]], "uid 1: is there twice"),
        ([1, 2], [[3]], "2 uids, and tokens of 1 sequences"),
        ([1, 2], [[3], []], r"tokens\[1\]: has none"),
        ([1], [[3, 384]], r"tokens\[0\]: 384 is no token; this model has those from 0 to 383"),
        ([1], [[-1]], r"tokens\[0\]: -1 is no token"),
        ([1], [[3, 1.5]], r"tokens\[0\]: wants integers: 'float' object"),
        ([1], [torch.tensor([1.0])], r"tokens\[0\]: torch.float32, wants integers"),
    ],
)
@pytest.mark.parametrize("do_checks", [True, False])
def test_what_is_wrong_in_itself_is_refused_whatever_is_checked(
    engine: RaggedEngine, uids: Any, tokens: Any, message: str, do_checks: bool
) -> None:
    engine.put([2], [[9]])
    seen = snapshot(engine)
    with pytest.raises(ValueError, match=message):
        engine.put(uids, tokens, do_checks)
    assert snapshot(engine) == seen


def test_tokens_have_to_be_on_the_host(engine: RaggedEngine) -> None:
    with pytest.raises(RuntimeError, match="Expected tokens to be on host but found device 'meta'"):
        engine.put([1], [torch.zeros(2, dtype=torch.int64, device="meta")])


def test_can_schedule_refuses_what_put_does(engine: RaggedEngine) -> None:
    with pytest.raises(ValueError, match="uid 1: is there twice"):
        engine.can_schedule([1, 1], [1, 1])
    with pytest.raises(ValueError, match="lengths: 0; a sequence takes part with one token at least"):
        engine.can_schedule([1], [0])


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_a_forward_that_fails_leaves_no_trace(
    engine: RaggedEngine, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    expected = engine.put([1], [some_tokens(20)])
    engine.flush(1)
    engine.put([1], [some_tokens(20)[:10]])
    seen = snapshot(engine)

    def forward(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine._engine, "forward", forward)
        with pytest.raises(type(error)):
            engine.put([1, 2], [some_tokens(20)[10:], [4]])
    assert snapshot(engine) == seen
    assert torch.equal(engine.put([1], [some_tokens(20)[10:]]), expected)


# -- what can be asked ------------------------------------------------------------------------------------------------


def test_query_says_what_fits(engine: RaggedEngine) -> None:
    assert engine.query(1, 20, 9) == (20, 3)
    assert engine.query(1, 20, 2) == (16, 2)
    assert engine.query(1, 100, 9) == (40, 5)  # max_context
    engine.put([1], [some_tokens(13)])
    assert engine.query(1, 1, 0) == (1, 0)
    assert engine.query(1, 9, 0) == (3, 0)
    assert engine.query(1, 9, 1) == (9, 1)
    assert engine.query(1, 100, 9) == (27, 3)
    for uid in (2, 3, 4):
        engine.put([uid], [[3]])
    assert engine.query(5, 1, 1) == (0, 0)
    assert engine.query(4, 1, 1) == (1, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        engine.query(1, -1, 0)


def test_remaining_capacity_is_what_is_left_of_the_blocks(engine: RaggedEngine) -> None:
    assert engine.get_remaining_block_capacity(1) == 0
    engine.put([1], [some_tokens(3)])
    assert engine.get_remaining_block_capacity(1) == 5
    engine.put([1], [some_tokens(5)])
    assert engine.get_remaining_block_capacity(1) == 0


def test_flushing_frees_everything_and_an_unknown_uid_is_a_warning(
    engine: RaggedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.put([1, 2], [some_tokens(9), some_tokens(8)])
    engine.offload(1)
    assert engine.free_blocks == 8
    engine.flush(1)
    engine.flush(2)
    assert (engine.free_blocks, len(engine.sequences), engine._swap.used_bytes) == (9, 0, 0)
    with caplog.at_level(logging.WARNING):
        engine.flush(2)
    assert "Attempting to flush sequence 2 which does not exist" in caplog.text


# -- the swap and the handoff -----------------------------------------------------------------------------------------


def test_an_offloaded_sequence_comes_back_with_the_same_bytes_into_other_blocks(engine: RaggedEngine) -> None:
    tokens = some_tokens(23)
    expected = engine.put([1], [tokens])
    engine.flush(1)
    engine.put([1], [tokens[:22]])
    before = engine.export_sequence(1)
    engine.offload(1)
    assert (engine.free_blocks, engine._swap.used_bytes) == (9, before.num_bytes)
    assert torch.equal(engine.export_sequence(1).blocks, before.blocks)
    assert engine.can_schedule([1], [1]) is R.KVCacheLimitExceeded
    assert (engine.query(1, 5, 9), engine.get_remaining_block_capacity(1)) == ((0, 0), 0)
    with pytest.raises(SchedulingError):
        engine.put([1], [tokens[22:]])
    with pytest.raises(ValueError, match="uid 1: is offloaded; restore it first"):
        engine.put([2, 1], [[5], tokens[22:]], do_checks=False)
    engine.put([2], [some_tokens(9)])  # takes the blocks that it had
    engine.restore(1)
    assert torch.equal(engine.export_sequence(1).blocks, before.blocks)
    assert torch.equal(engine.put([1], [tokens[22:]]), expected)


def test_a_restore_without_blocks_changes_nothing(engine: RaggedEngine) -> None:
    engine.put([1], [some_tokens(24)])
    engine.offload(1)
    for uid, length in ((2, 24), (3, 24), (4, 16)):
        engine.put([uid], [some_tokens(length)])
    seen = snapshot(engine)
    with pytest.raises(SchedulingError) as e:
        engine.restore(1)
    assert e.value.result is R.KVCacheLimitExceeded
    assert snapshot(engine) == seen
    engine.flush(2)
    engine.restore(1)


def test_what_cannot_be_offloaded_or_restored_is_said(tiny_model: MakeModel, engine: RaggedEngine) -> None:
    engine.put([1], [[5]])
    for verb, uid, message in (
        ("restore", 1, "uid 1: is not offloaded"),
        ("offload", 2, "uid 2: no such sequence is tracked"),
        ("restore", 2, "uid 2: no such sequence is tracked"),
        ("export_sequence", 2, "uid 2: no such sequence is tracked"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(engine, verb)(uid)
    engine.offload(1)
    with pytest.raises(ValueError, match="uid 1: is offloaded already"):
        engine.offload(1)
    resident = make_engine(tiny_model("llama"), limits={"offload": False})
    resident.put([1], [[5]])
    with pytest.raises(ValueError, match=r"state_manager\.offload: false; set it"):
        resident.offload(1)


@pytest.mark.parametrize("block_tokens", [8, 4, 32])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_a_sequence_goes_on_in_another_engine_to_the_same_bits(
    tiny_model: MakeModel, engine: RaggedEngine, block_tokens: int, is_offloaded: bool
) -> None:
    other = make_engine(tiny_model("llama"), num_blocks=20, block_tokens=block_tokens)
    tokens = some_tokens(23)
    engine.put([1], [tokens[:19]])
    if is_offloaded:
        engine.offload(1)
    other.put([7], [some_tokens(5)])
    other.import_sequence(1, engine.export_sequence(1))
    if is_offloaded:
        engine.restore(1)
    assert torch.equal(other.put([1], [tokens[19:]]), engine.put([1], [tokens[19:]]))
    back, there = other.export_sequence(1), engine.export_sequence(1)
    engine.import_sequence(2, back)
    rows = there.layout.format.elements(engine.export_sequence(2).blocks), there.layout.format.elements(there.blocks)
    full = slice(0, 2)  # of three blocks; in the third one 7 of 8 rows are the tokens'
    assert torch.equal(rows[0][full], rows[1][full])
    assert torch.equal(rows[0][2, :, :, :, :7], rows[1][2, :, :, :, :7])


def test_a_sequence_goes_on_in_another_dtype_of_the_cache_if_that_is_wanted(
    tiny_model: MakeModel, engine: RaggedEngine
) -> None:
    quantized = make_engine(tiny_model("llama"), kv_dtype="int8")
    engine.put([1], [some_tokens(19)])
    state = engine.export_sequence(1)
    with pytest.raises(ValueError, match=r"dtype: keys and values are float32 where .*, int8 here; set convert_dtype"):
        quantized.import_sequence(1, state)
    quantized.import_sequence(1, state, convert_dtype=True)
    torch.testing.assert_close(quantized.put([1], [[5]]), engine.put([1], [[5]]), atol=0.2, rtol=0.05)


def test_an_import_that_fails_changes_nothing(
    tiny_model: MakeModel, engine: RaggedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_engine(tiny_model("llama"), num_blocks=20, limits={"max_context": 80, "max_ragged_batch_size": 80})
    other.put([1], [some_tokens(41)])
    other.put([2], [some_tokens(30)])
    long, short = other.export_sequence(1), other.export_sequence(2)
    for uid in (5, 6):
        engine.put([uid], [some_tokens(24)])
    seen = snapshot(engine)
    for state, result in ((long, R.SequenceTokenLimitExceeded), (short, R.KVCacheLimitExceeded)):
        with pytest.raises(SchedulingError) as e:
            engine.import_sequence(1, state)
        assert e.value.result is result
    with pytest.raises(ValueError, match="uid 5: is tracked already; flush it first"):
        engine.import_sequence(5, short)
    foreign = make_engine(tiny_model("qwen3"))
    foreign.put([1], [[5]])
    with pytest.raises(ValueError, match=r"model_digest: '.*' where the sequence comes from, '.*' here"):
        engine.import_sequence(1, foreign.export_sequence(1))
    assert snapshot(engine) == seen
    engine.flush(6)
    seen = snapshot(engine)

    def put(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(short), "put", put)
        with pytest.raises(MemoryError):
            engine.import_sequence(1, short)
    assert snapshot(engine) == seen
    for uid in (6, 7, 8):
        engine.put([uid], [[5]])
    with pytest.raises(SchedulingError) as e:
        engine.import_sequence(1, short)
    assert e.value.result is R.EngineSequenceLimitExceeded


# -- where it comes from ----------------------------------------------------------------------------------------------


def test_a_model_in_memory_and_one_in_a_folder_are_the_same(tiny_model: MakeModel) -> None:
    folder = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    one, other = make_engine(model), make_engine(folder)
    tokens = some_tokens(9)
    assert torch.equal(one.put([1], [tokens]), other.put([1], [tokens]))
    # two of one model in memory hand over to each other
    make_engine(model).import_sequence(2, one.export_sequence(1))


def test_a_model_that_has_no_policy_or_no_tokens_to_answer_is_not_supported(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match="Unsupported model type mamba"):
        RaggedEngine(tmp_path)
    with pytest.raises(ValueError, match="Unsupported model type bert"):
        RaggedEngine(tiny_encoder())
    with pytest.raises(ModelError, match="no model 'nowhere'"):
        RaggedEngine("nowhere")
    with pytest.raises(ValueError, match="model: wants a model, a folder or a name, has a int"):
        RaggedEngine(3)  # pyright: ignore[reportArgumentType]


def test_a_serialized_engine_is_read_again_without_code(tiny_model: MakeModel, tmp_path: Path) -> None:
    engine = make_engine(tiny_model("qwen3"))
    engine.put([1], [some_tokens(9)])
    engine.serialize(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".bin"}
    again = make_engine(tmp_path)
    again.import_sequence(1, engine.export_sequence(1))
    assert torch.equal(again.put([1, 2], [[5], some_tokens(7)]), engine.put([1, 2], [[5], some_tokens(7)]))
    with pytest.raises(ValueError, match=r"dtype: torch.float16, and .* was serialized in torch.float32; leave it out"):
        make_engine(tmp_path, dtype="fp16")
    about = json.loads((tmp_path / "ragged.json").read_text())
    (tmp_path / "ragged.json").write_text(json.dumps({**about, "packing": "cpu: in another way"}))
    with pytest.raises(ValueError, match="was serialized as cpu: in another way, and here it would be cpu, tp_size"):
        make_engine(tmp_path)
    (tmp_path / "ragged.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what serialize wrote"):
        make_engine(tmp_path)


def test_weights_in_fp6_with_activations_in_float16(tiny_model: MakeModel, tmp_path: Path) -> None:
    quantization = {"quantization_mode": "wf6af16"}
    engine = make_engine(tiny_model("llama"), dtype=None, quantization=quantization)
    plain = make_engine(tiny_model("llama"), dtype="fp16")
    assert engine.plan.dtype == engine.plan.layout.dtype == "float16"
    tokens = some_tokens(20)
    logits, expected = engine.put([1], [tokens]), plain.put([1], [tokens])
    assert 0 < (logits - expected).abs().mean() < 0.3 * expected.abs().mean()  # two bits of mantissa
    with pytest.raises(ValueError, match="model_digest: "):
        plain.import_sequence(2, engine.export_sequence(1))  # their keys and values are others
    engine.serialize(tmp_path)
    again = make_engine(tmp_path, dtype=None, quantization=quantization)
    assert torch.equal(again.put([1], [tokens]), logits)
    with pytest.raises(ValueError, match=r"was serialized as .*; serialize it here, .* with the same options"):
        make_engine(tmp_path, dtype=None)


def test_options_come_from_a_dictionary_a_file_or_keywords(tiny_model: MakeModel, tmp_path: Path) -> None:
    limits = {**LIMITS, "max_ragged_batch_size": 30}
    (tmp_path / "options.json").write_text(json.dumps({"manager": limits}))
    for engine in (
        RaggedEngine(tiny_model("llama"), tmp_path / "options.json"),
        RaggedEngine(str(tiny_model("llama")), state_manager=limits),
    ):
        assert engine.config.state_manager.max_ragged_batch_size == 30
        assert engine.free_blocks == engine.num_blocks == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_tokens": 12}, "block_tokens: 12 is not a power of two; use 16"),
        ({"dtype": "int8"}, "dtype: int8 is not computed in; use float32, bfloat16, float16"),
        ({"kv_dtype": "int3"}, "dtype 'int3' is none of"),
        ({"quantization": {"quantization_mode": "wf8"}}, "Unsupported quantization mode"),
    ],
)
def test_options_that_cannot_be_are_refused(tiny_model: MakeModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(tiny_model("llama"), **options)


def test_the_cache_takes_what_the_memory_leaves(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    block_bytes = make_engine(tiny_model("llama")).plan.layout.block_bytes
    free_bytes = 1_000_000 + 7 * block_bytes + 5
    monkeypatch.setattr(ragged_engine, "free_memory", lambda device: free_bytes)

    def with_memory(mode: str, size: int) -> RaggedEngine:
        return make_engine(tiny_model("llama"), limits={"memory_config": {"mode": mode, "size": size}})

    assert with_memory("reserve", 1_000_000).num_blocks == 6  # and the null block
    # no more than 4 sequences of 40 tokens can hold
    assert with_memory("reserve", 1).num_blocks == min(free_bytes // block_bytes - 1, 4 * 5)
    assert with_memory("allocate", 6).num_blocks == 6
    for mode, size in (("reserve", 1_000_000 + 6 * block_bytes), ("allocate", free_bytes // block_bytes)):
        with pytest.raises(ValueError, match=f"Insufficient memory to allocate KV-caches: .* asks to {mode} {size}"):
            with_memory(mode, size)


def test_free_memory_is_that_of_the_host_or_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    free = ragged_memory.free_memory("cpu")
    assert free > 0
    monkeypatch.setattr(ragged_memory.Cgroup, "memory_bytes", property(lambda self: 1 << 20))
    assert ragged_memory.free_memory("cpu") < 1 << 20 < free


def test_a_destroyed_engine_says_so(tiny_model: MakeModel) -> None:
    engine = make_engine(tiny_model("llama"))
    engine.put([1], [[5]])
    engine.destroy()
    engine.destroy()
    assert len(engine.sequences) == 0
    with pytest.raises(RuntimeError, match="this engine was destroyed"):
        engine.put([1], [[5]])
    with pytest.raises(RuntimeError, match="this engine was destroyed"):
        engine.serialize("nowhere")
