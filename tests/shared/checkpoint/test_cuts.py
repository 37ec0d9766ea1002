"""The arithmetic of cuts, against heads that are dealt out one by one, and the tables against real names."""

import re
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPModel

from shared.checkpoint.cut_tables import (
    COLUMN_PARALLEL,
    GATE_UP,
    GPT2,
    GROUPS,
    HUGGING_FACE,
    KEYS,
    OUTPUT,
    QKV,
    QKV_ALIKE,
    QUERIES,
    ROW_PARALLEL,
    VOCABULARY,
    WHOLE,
    table_for,
)
from shared.checkpoint.cuts import Cut, CutTable, Part, Sizes, balanced

RANKS = range(1, 9)
HEAD_DIM = 2


def grid() -> Iterator[tuple[int, int, int]]:
    """Heads, key-value heads, ranks."""
    for heads in range(1, 13):
        for kv_heads in (kv for kv in range(1, heads + 1) if heads % kv == 0):
            for ranks in RANKS:
                yield heads, kv_heads, ranks


def dealt(heads: int, kv_heads: int, ranks: int) -> list[tuple[list[int], list[int]]] | None:
    """Queries' and key-value heads of each rank; None where they cannot be dealt."""
    if heads < ranks:
        return None
    if kv_heads >= ranks:
        hands: list[list[int]] = [[] for _ in range(ranks)]
        counts = [len(range(rank, kv_heads, ranks)) for rank in range(ranks)]
        for rank, count in enumerate(counts):
            first = sum(counts[:rank])
            hands[rank] = list(range(first, first + count))
        group = heads // kv_heads
        return [([q for q in range(heads) if q // group in hand], hand) for hand in hands]
    if ranks % kv_heads or heads % ranks:
        return None
    per_rank = heads // ranks
    queries = [list(range(rank * per_rank, (rank + 1) * per_rank)) for rank in range(ranks)]
    return [(hand, sorted({q // (heads // kv_heads) for q in hand})) for hand in queries]


def rows(spans: tuple[tuple[int, int], ...]) -> list[int]:
    return [row for start, stop in spans for row in range(start, stop)]


def rows_of(heads: list[int], first: int = 0) -> list[int]:
    return [first + head * HEAD_DIM + d for head in heads for d in range(HEAD_DIM)]


def test_heads_lie_where_they_are_dealt() -> None:
    refused = 0
    for heads, kv_heads, ranks in grid():
        sizes, expected = Sizes(heads, kv_heads), dealt(heads, kv_heads, ranks)
        length = (heads + 2 * kv_heads) * HEAD_DIM
        if expected is None:
            refused += 1
            with pytest.raises(ValueError, match=rf"{heads} heads .*cannot be cut for {ranks} ranks"):
                QKV.spans(length, ranks - 1, ranks, sizes)
            continue
        for rank, (queries, keys) in enumerate(expected):
            fused = QKV.spans(length, rank, ranks, sizes)
            key_rows = rows_of(keys, heads * HEAD_DIM)
            assert rows(fused) == rows_of(queries) + key_rows + [row + kv_heads * HEAD_DIM for row in key_rows]
            assert rows(QUERIES.spans(heads * HEAD_DIM, rank, ranks, sizes)) == rows_of(queries)
            assert rows(OUTPUT.spans(heads * HEAD_DIM, rank, ranks, sizes)) == rows_of(queries)
            assert rows(KEYS.spans(kv_heads * HEAD_DIM, rank, ranks, sizes)) == rows_of(keys)
            assert QKV.whole(len(rows(fused)), rank, ranks, sizes) == length
    assert refused > 100


def test_groups_are_cut_whole() -> None:
    sizes = Sizes(num_heads=6, num_kv_heads=3)
    group = 2 * HEAD_DIM + 2 * HEAD_DIM
    assert [GROUPS.spans(3 * group, rank, 2, sizes) for rank in range(2)] == [
        ((0, 2 * group),),
        ((2 * group, 3 * group),),
    ]
    with pytest.raises(ValueError, match="6 heads on 3 key-value heads cannot be cut for 6 ranks"):
        GROUPS.spans(3 * group, 0, 6, sizes)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_vocabulary_is_padded(ranks: int) -> None:
    spans = [VOCABULARY.spans(50, rank, ranks, Sizes(vocab_size=50)) for rank in range(ranks)]
    covered = [row for part in spans for row in rows(part)]
    assert covered == list(range(len(covered)))
    assert 50 <= len(covered) < 50 + ranks
    assert len({len(rows(part)) for part in spans}) == 1


def test_equal_shares() -> None:
    assert [COLUMN_PARALLEL.spans(12, rank, 3, Sizes()) for rank in range(3)] == [((0, 4),), ((4, 8),), ((8, 12),)]
    assert GATE_UP.spans(12, 1, 3, Sizes()) == ((2, 4), (8, 10))
    assert QKV_ALIKE.spans(12, 1, 2, Sizes()) == ((2, 4), (6, 8), (10, 12))
    assert [balanced(7, rank, 3) for rank in range(3)] == [(0, 3), (3, 5), (5, 7)]
    with pytest.raises(ValueError, match="10 columns cannot be cut into 4 equal parts"):
        ROW_PARALLEL.spans(10, 0, 4, Sizes(8))
    with pytest.raises(ValueError, match="10 rows cannot be cut into 4 equal parts"):
        QUERIES.spans(10, 0, 2, Sizes(4))
    with pytest.raises(ValueError, match="give these sizes"):
        QKV.spans(12, 0, 2, Sizes())
    with pytest.raises(ValueError, match="5 rows are not 3 equal parts"):
        QKV.whole(5, 1, 2, Sizes(2))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 50}, Sizes(8, 2, 50)),
        ({"n_head": 8, "vocab_size": 50}, Sizes(8, None, 50)),
        ({"n_heads": 8, "attn_config": {"kv_n_heads": 1}}, Sizes(8, 1)),
        ({"num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True}, Sizes(71, 1)),
        (
            {"num_attention_heads": 8, "num_kv_heads": 2, "multi_query": True, "new_decoder_architecture": True},
            Sizes(8, 2),
        ),
        ({"num_attention_heads": 8, "multi_query": False}, Sizes(8, 8)),
        ({"num_heads": "8"}, Sizes()),
    ],
)
def test_sizes_of_a_config(config: dict[str, object], sizes: Sizes) -> None:
    assert Sizes.of_config(config) == sizes


@pytest.mark.parametrize(
    "fields", [{"num_heads": 0}, {"vocab_size": True}, {"num_heads": 8, "num_kv_heads": 3}, {"num_kv_heads": 3}]
)
def test_sizes_that_cannot_be(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1|cannot share"):
        Sizes(**fields)


def test_rules_of_a_table() -> None:
    parts: tuple[Part, ...] = ("even",)
    table = CutTable(
        (("proj\\.weight", Cut(0, parts)), ("q_proj\\.weight", WHOLE)), named={"x.proj.weight": ROW_PARALLEL}
    )
    assert table.of("x.proj.weight") is ROW_PARALLEL
    assert table.of("y.proj.weight") == Cut(0)
    assert table.of("y.q_proj.weight") is WHOLE, "a rule is of whole parts of a name"
    assert table.of("y.proj.weight.x") is None


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FEW_HEADS = {**SIZES, "num_key_value_heads": 4}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {**SIZES, "attention_bias": True, "mlp_bias": True},
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 4},
    "gemma2": {**SIZES, "head_dim": 4},
    "phi": SIZES,
    "phi3": SIZES,
    "gpt2": {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 4},
    "gptj": {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "gpt_neo": {**SIZES, "num_layers": 1, "num_heads": 4, "attention_types": [[["local"], 1]]},
    "gpt_neox": FEW_HEADS,
    "opt": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {"vocab_size": 32, "hidden_size": 16, "n_layer": 1, "n_head": 4},
    "falcon": {**FEW_HEADS, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "mpt": {"vocab_size": 32, "d_model": 16, "n_layers": 1, "n_heads": 4},
    "stablelm": {**SIZES, "qk_layernorm": True, "use_qkv_bias": True},
    "olmo2": SIZES,
    "granite": SIZES,
    "bert": {**SIZES, "max_position_embeddings": 16},
    "roberta": {**SIZES, "max_position_embeddings": 16},
    "distilbert": {"vocab_size": 32, "dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 24},
}
ENCODERS = ("bert", "roberta", "distilbert")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_has_a_cut_that_fits(family: str) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    with torch.device("meta"):
        model = (AutoModel if family in ENCODERS else AutoModelForCausalLM).from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    table = table_for(shapes).sized(Sizes.of_config(config.to_dict()))
    assert (table.rules == GPT2.rules) == (family == "gpt2")
    cut_shapes = {
        name: shape for name, shape in shapes.items() if not re.search(r"inv_freq|position_ids|\.bias_mask", name)
    }
    for name, shape in cut_shapes.items():
        cut = table.of(name)
        assert cut is not None, name
        if cut.dim is not None:
            assert len(rows(cut.spans(shape[cut.dim], 1, 2, table.sizes))) == shape[cut.dim] // 2, name
            if cut != VOCABULARY and {24, 64} & set(shape):
                assert shape[cut.dim] in (24, 64), f"{name}: an MLP is cut between its two linears"
        elif len(shape) == 2:
            assert re.search(r"position|wpe|token_type|pooler", name), f"{name} is large, and whole on every rank"
    linears = [
        name for name in cut_shapes if re.search(r"\d\..*(proj|fc|dense|lin|Wqkv|query|key|value).*weight", name)
    ]
    dims = {name: cut.dim for name in linears if (cut := table.of(name)) is not None}
    assert {0, 1} <= set(dims.values()), "columns and rows of each layer"


def test_clip_has_a_cut_for_every_parameter() -> None:
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "clip", text_config={**tower, "vocab_size": 32}, vision_config={**tower, "image_size": 4, "patch_size": 2}
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    for name in model.state_dict():
        assert HUGGING_FACE.of(name) is not None, name


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("model.layers.0.block_sparse_moe.gate.weight", WHOLE),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", COLUMN_PARALLEL),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", ROW_PARALLEL),
        ("model.layers.0.mlp.experts.3.down_proj.weight", ROW_PARALLEL),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", COLUMN_PARALLEL),
        ("model.layers.0.mlp.shared_expert_gate.weight", WHOLE),
        ("model.layers.0.attention.wqkv.weight", GROUPS),
        ("model.layers.0.attention.wo.weight", OUTPUT),
        ("model.layers.0.feed_forward.w3.weight", COLUMN_PARALLEL),
        ("output.weight", VOCABULARY),
        ("model.tok_embeddings.weight", VOCABULARY),
        ("model.layers.0.attention_norm.weight", WHOLE),
        ("model.layers.0.mystery.weight", None),
    ],
)
def test_names_of_experts_and_internlm(name: str, cut: Cut | None) -> None:
    assert HUGGING_FACE.of(name) == cut
