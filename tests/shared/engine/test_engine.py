from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from gateway.model import ServedModel
from kernels.kv_format import GREATEST
from shared.batch import BatchEntry
from shared.config import ConfigError, QuantizationMode, load_config
from shared.engine import Engine, EnginePlan
from shared.graphs import make_buckets
from shared.kv_cache import KvLayout
from shared.model_store import ModelStore
from shared.parallel.sharding import Shard
from tests.engines import tiny_engine

MakeModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def engine(tiny_model: MakeModel) -> Engine:
    return tiny_engine(tiny_model("qwen3"), num_blocks=96)


def plan(model: Path, **overrides: object) -> EnginePlan:
    config = load_config(None, {"model": str(model), "dtype": "float32", **overrides})
    return EnginePlan.of(config, config.decode, ModelStore().resolve(config.model))


@pytest.mark.parametrize("max_sequences", [1, 3, 64, 100, 500])
def test_buckets_ascend_to_the_largest_batch(max_sequences: int) -> None:
    buckets = make_buckets(max_sequences)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == max_sequences
    assert max_sequences < 4 or buckets[:3] == [1, 2, 4]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 13])
def test_padding_to_a_bucket_changes_no_bits(engine: Engine, rows: int) -> None:
    entries = [BatchEntry([5 + row], 0, [1 + row]) for row in range(rows)]
    together = engine.forward(entries).clone()
    assert together.shape == (rows, engine.plan.architecture.vocab_size)
    for row, entry in enumerate(entries):
        assert torch.equal(engine.forward([entry])[0], together[row])


def test_a_decode_step_beside_a_prompt_has_the_same_bits(engine: Engine) -> None:
    engine.forward([BatchEntry(list(range(5, 25)), 0, [1, 2])])
    step = BatchEntry([9], 20, [1, 2])
    alone = engine.forward([step]).clone()
    beside = engine.forward([step, BatchEntry(list(range(30, 60)), 0, [3, 4], "none"), BatchEntry([7], 0, [5])])
    assert beside.shape[0] == 2
    assert torch.equal(beside[0], alone[0])


def test_what_a_block_held_before_changes_nothing(engine: Engine) -> None:
    def run() -> list[torch.Tensor]:
        prompt = engine.forward([BatchEntry(list(range(5, 25)), 0, [1, 2])])
        steps = engine.forward([BatchEntry([9], 20, [1, 2]), BatchEntry([7], 0, [3]), BatchEntry([8], 0, [4])])
        return [prompt, steps.clone()]

    clean = run()
    engine.kv.pool.fill_(0xFF)  # NaN
    assert all(torch.equal(a, b) for a, b in zip(run(), clean, strict=True))
    engine.kv.pool.zero_()


def test_copied_blocks_are_equal(engine: Engine) -> None:
    engine.forward([BatchEntry(list(range(5, 25)), 0, [1, 2])])
    expected = engine.forward([BatchEntry([9], 20, [1, 2])]).clone()
    engine.copy_blocks([1, 2], [8, 7])
    assert torch.equal(engine.forward([BatchEntry([9], 20, [8, 7])]), expected)


def test_a_plan_says_what_cannot_be_served(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="max_context"):
        plan(model, max_context=4096)
    assert plan(model, max_context=512).max_context == 512
    with pytest.raises(ConfigError, match="kv_memory_mib"):
        plan(model, decode={"kv_memory_mib": 1}, block_tokens=1 << 20)
    assert plan(model, decode={"num_blocks": 10}).num_blocks == 10
    assert (plan(model, dtype="auto").dtype, plan(model, dtype="auto").layout.dtype) == ("bfloat16", "bfloat16")


def test_keys_and_values_are_kept_as_the_role_says(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    plain, quantized = plan(model), plan(model, kv_dtype="int8", decode={"kv_dtype": "fp8", "block_tokens": 32})
    assert (plain.dtype, plain.layout.dtype, plain.layout.block_tokens) == ("float32", "float32", 16)
    assert (quantized.dtype, quantized.layout.dtype, quantized.layout.block_tokens) == ("float32", "fp8", 32)
    assert plain.layout.difference(quantized.layout) == ["dtype", "block_tokens"]


def test_workers_of_another_quantization_do_not_agree_and_the_gateway_knows(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    files = ModelStore().resolve(str(model))
    layouts = {mode: plan(model, quantization=mode).layout for mode in get_args(QuantizationMode)}
    assert layouts["none"].model_digest == files.digest
    assert len({layout.digest for layout in layouts.values()}) == len(layouts) > 5
    assert layouts["int8"].difference(layouts["int4"]) == ["model_digest"]
    for mode, layout in layouts.items():
        assert len(layout.model_digest) == 64
        assert ServedModel.load("tiny", files, mode).digest == layout.model_digest


def test_weights_that_are_left_out_are_part_of_the_digest_and_have_to_be_there(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    files = ModelStore().resolve(str(model))
    layouts = []
    for exclude in ("", "lm_head", "*.down,layers.0.*", "layers.0.*,*.down"):
        config = load_config(None, {"model": str(model), "quantization": "int8", "quantization_exclude": exclude})
        layouts.append(EnginePlan.of(config, config.decode, files).layout)
        assert ServedModel.load("tiny", files, config.weights_form).digest == layouts[-1].model_digest
    assert len({layout.model_digest for layout in layouts[:3]}) == 3
    assert layouts[2] == layouts[3], "the order says nothing"
    with pytest.raises(ConfigError, match=r"no weight is called embedding, layers\.9\.\*; there are layers\.0\.qkv, "):
        plan(model, quantization="int8", quantization_exclude="layers.9.*,embedding,lm_head")


def test_ranks_have_one_number_of_blocks_and_share_the_threads(tiny_model: MakeModel) -> None:
    """As many as one process has in the same memory, however uneven the ranks' heads are: 2, 2, 1 and 1."""
    model = tiny_model("bloom")
    config = load_config(None, {"model": str(model), "threads": 9, "decode": {"kv_memory_mib": 1}})
    files = ModelStore().resolve(str(model))
    alone = EnginePlan.of(config, config.decode, files)
    ranks = [EnginePlan.of(config, config.decode, files, Shard(rank, 4)) for rank in range(4)]
    assert [plan.layout.num_kv_heads for plan in ranks] == [2, 2, 1, 1]
    assert {plan.num_blocks for plan in ranks} == {alone.num_blocks}
    assert sum(plan.pool_bytes for plan in ranks) == alone.pool_bytes <= 1 << 20
    assert ({plan.num_threads for plan in ranks}, alone.num_threads) == ({2}, 9)
    assert KvLayout.joined([plan.layout for plan in ranks]) == alone.layout


def test_a_quantized_engine_replays_what_it_computes_in_a_prompt(tiny_model: MakeModel) -> None:
    quantized = Engine(plan(tiny_model("qwen3"), quantization="int4", decode={"num_blocks": 20}))
    quantized.warm_up()
    tokens = list(range(5, 40))
    prompt = quantized.forward([BatchEntry(tokens, 0, [1, 2, 3], "all")]).clone()
    for position, token in enumerate(tokens):
        assert torch.equal(quantized.forward([BatchEntry([token], position, [4, 5, 6])])[0], prompt[position])


@pytest.mark.parametrize("kv_dtype", GREATEST)
def test_a_quantized_cache_gives_the_same_bits_alone_in_chunks_and_in_a_batch(
    tiny_model: MakeModel, engine: Engine, kv_dtype: str
) -> None:
    quantized = tiny_engine(tiny_model("qwen3"), num_blocks=96, kv_dtype=kv_dtype)
    quantized.warm_up()
    tokens, table = [5 + i * 7 % 90 for i in range(45)], [3, 1, 2]
    whole = quantized.forward([BatchEntry(tokens, 0, table, "all")]).clone()
    for size in (1, 7, 16, 40):
        parts = [BatchEntry(tokens[i : i + size], i, [6, 4, 5], "all") for i in range(0, 45, size)]
        assert torch.equal(torch.cat([quantized.forward([part]).clone() for part in parts]), whole), size
    for width in (1, 5):  # decode steps of copies of the sequence, of which the last block is their own
        for row in range(width):
            quantized.copy_blocks(table, [10 + 3 * row, 11 + 3 * row, 12 + 3 * row])
        steps = [BatchEntry([tokens[44]], 44, [10 + 3 * row, 11 + 3 * row, 12 + 3 * row]) for row in range(width)]
        assert torch.equal(quantized.forward(steps), whole[44:].expand(width, -1))
    beside = quantized.forward(
        [BatchEntry(tokens[20:], 20, table, "all"), BatchEntry(list(range(9, 60)), 0, [7, 8, 9, 13])]
    )
    assert torch.equal(beside[:25], whole[20:])
    plain = engine.forward([BatchEntry(tokens, 0, table, "all")])
    difference = (whole - plain).abs()
    assert 0 < difference.mean() < (0.02 if kv_dtype == "int8" else 0.1) * plain.std()


def test_end_tokens_are_the_models_own(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert plan(model).eos_token_ids == (2,)
    copy = tmp_path / "chat"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert plan(copy).eos_token_ids == (2, 5)


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "gemma2"])
def test_activations_lie_ready_for_the_largest_step(kind: str, tiny_model: MakeModel) -> None:
    model = tiny_model(kind)
    settled = plan(model, decode={"num_blocks": 64, "max_running": 8, "chunk_tokens": 96})
    engine = Engine(settled)
    try:
        assert engine.workspace_bytes == 0
        engine.warm_up()
        ready = engine.workspace_bytes
        assert settled.batch_tokens == 104
        assert ready > 104 * settled.architecture.hidden_size * 4
        engine.forward([BatchEntry([5] * 100, 0, list(range(1, 8))), BatchEntry([5] * 4, 0, [9])])
        assert engine.workspace_bytes == ready
    finally:
        engine.close()
