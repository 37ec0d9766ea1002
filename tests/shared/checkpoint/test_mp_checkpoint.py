"""Shards written for one degree and read at another; and DeepSpeed's own, which are pickle in eight parts."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.quantization import Integers, Quantization, quantize
from shared.checkpoint import (
    HUGGING_FACE,
    INJECTED,
    Checkpoint,
    CheckpointError,
    Cut,
    CutTable,
    MappingCheckpoint,
    Sizes,
    TensorParallelCheckpoint,
    open_any,
    save_mp_checkpoint,
)
from shared.model_files import ModelFiles, Weights
from shared.models.loading import load_weights
from shared.policies.table import architecture_of
from tests.shared.checkpoint.test_tensor_parallel import TABLE, model, split
from tests.tiny_models import tiny_model

LLAMA = HUGGING_FACE.sized(Sizes(4, 2, 384))


def assert_same(checkpoint: Checkpoint, expected: Checkpoint) -> None:
    assert checkpoint.names() == expected.names()
    for name in expected.names():
        assert torch.equal(checkpoint.tensor(name), expected.tensor(name)), name
        found, integers = checkpoint.integers(name), expected.integers(name)
        assert (found is None) == (integers is None), name
        if found is not None and integers is not None:
            assert torch.equal(found.values, integers.values)
            assert torch.equal(found.scale, integers.scale)


def int8(weight: Tensor) -> Integers:
    values, scale, _ = quantize(weight, Quantization(8))
    return Integers(8, values, scale)


@pytest.mark.parametrize("saved", [1, 2, 4])
def test_reloaded_at_any_degree(saved: int, tmp_path: Path) -> None:
    parameters = {name: int8(value) if name == "up.weight" else value for name, value in model().items()}
    whole = MappingCheckpoint(parameters)
    config = save_mp_checkpoint(tmp_path / "out", parameters, TABLE, saved)
    assert config == tmp_path / "out" / "ds_inference_config.json"
    for source in (config, tmp_path / "out"):
        assert_same(open_any(source), whole)
    for ranks in (1, 2, 4):
        for rank, expected in enumerate(split(whole, ranks)):
            assert_same(open_any(config, rank=rank, ranks=ranks), expected)


def test_what_is_written(tmp_path: Path) -> None:
    save_mp_checkpoint(tmp_path, model(torch.bfloat16), TABLE, 2)
    description = json.loads((tmp_path / "ds_inference_config.json").read_text())
    assert {key: description[key] for key in description if key != "cuts"} == {
        "type": "ds_model",
        "base_dir": "",
        "checkpoints": {"non_tp": ["non-tp.safetensors"], "tp": ["tp_00_of_02.safetensors", "tp_01_of_02.safetensors"]},
        "version": 1.0,
        "parallelization": "tp",
        "tp_size": 2,
        "dtype": "bfloat16",
        "sizes": {"num_heads": 8, "num_kv_heads": 4, "vocab_size": 50},
    }
    assert set(load_file(tmp_path / "non-tp.safetensors")) == {"norm", "o.bias", "down.bias"}
    assert load_file(tmp_path / "tp_01_of_02.safetensors")["down.weight"].shape == (16, 12)
    (tmp_path / "elsewhere").mkdir()
    for path in [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.json")]:
        path.rename(tmp_path / "elsewhere" / path.name)
    assert open_any(tmp_path / "elsewhere").names() == set(model())


def test_saved_again_at_another_degree(tmp_path: Path) -> None:
    whole = MappingCheckpoint(model())
    save_mp_checkpoint(tmp_path, whole, TABLE, 4)
    save_mp_checkpoint(tmp_path, open_any(tmp_path), TABLE, 2)
    assert_same(open_any(tmp_path), whole)
    assert json.loads((tmp_path / "ds_inference_config.json").read_text())["tp_size"] == 2


def test_a_model_of_a_folder_keeps_its_logits(tmp_path: Path) -> None:
    """The decoder's weights, packed, are the same from the folder and from its shards."""
    whole = open_any(tiny_model("llama"))
    save_mp_checkpoint(tmp_path, whole, LLAMA, 2)
    files = ModelFiles("x", tiny_model("llama"), Weights("safetensors", ()), "")
    packed = [
        load_weights(architecture_of(files.config), checkpoint, dtype=torch.float32, device="cpu").tensors()
        for checkpoint in (whole, open_any(tmp_path))
    ]
    assert packed[0].keys() == packed[1].keys()
    assert all(torch.equal(packed[0][name], packed[1][name]) for name in packed[0])


def test_nothing_is_written_of_what_has_no_cut(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no rule says how mystery is cut"):
        save_mp_checkpoint(tmp_path / "out", {"mystery": torch.zeros(2), "norm": torch.zeros(2)}, TABLE, 2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="tp_size must be at least 1, got 0"):
        save_mp_checkpoint(tmp_path / "out", {}, TABLE, 0)


def test_a_save_that_fails_leaves_no_description(tmp_path: Path) -> None:
    """Old shards beside new ones would be taken for one model."""
    save_mp_checkpoint(tmp_path, model(), TABLE, 2)
    with pytest.raises(CheckpointError, match=r"up\.weight: 24 rows cannot be cut into 5 equal parts"):
        save_mp_checkpoint(tmp_path, {"up.weight": model()["up.weight"]}, TABLE, 5)
    assert not (tmp_path / "ds_inference_config.json").exists()


def test_tied_tensors_are_both_written(tmp_path: Path) -> None:
    tied = torch.randn(4, 4)
    table = CutTable((("a|b", Cut(0)), ("c|d", Cut(None))))
    parameters = {"a": tied, "b": tied, "c": tied[:2], "d": tied.T}
    save_mp_checkpoint(tmp_path, parameters, table, 2)
    assert_same(open_any(tmp_path), MappingCheckpoint(parameters))


def test_a_shard_of_another_save(tmp_path: Path) -> None:
    save_mp_checkpoint(tmp_path, model(), TABLE, 2)
    path = tmp_path / "tp_01_of_02.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "down.weight": torch.zeros(16, 10)}, path)
    checkpoint = open_any(tmp_path)
    with pytest.raises(CheckpointError, match=r"down\.weight in .*: its parts of 12, 10 do not make one whole"):
        checkpoint.tensor("down.weight")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"tp_01_of_02\.safetensors is not a whole .* in \w"):
        open_any(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"names tp_01_of_02\.safetensors, but there is no"):
        open_any(tmp_path)


HIDDEN, HEADS, INNER = 8, 4, 16


def layer() -> dict[str, Tensor]:
    """One replaced layer, linears [out, in]."""
    return {
        "transformer.h.0.attention.attn_qkvw": torch.randn(3 * HIDDEN, HIDDEN),
        "transformer.h.0.attention.attn_qkvb": torch.randn(3 * HIDDEN),
        "transformer.h.0.attention.attn_ow": torch.randn(HIDDEN, HIDDEN),
        "transformer.h.0.attention.attn_ob": torch.randn(HIDDEN),
        "transformer.h.0.mlp.inter_w": torch.randn(INNER, HIDDEN),
        "transformer.h.0.mlp.inter_b": torch.randn(INNER),
        "transformer.h.0.mlp.output_w": torch.randn(HIDDEN, INNER),
        "transformer.h.0.mlp.output_b": torch.randn(HIDDEN),
        "transformer.h.0.mlp.attn_nw": torch.randn(HIDDEN),
        "transformer.h.0.norm_w": torch.randn(HIDDEN),
    }


def write_as_deepspeed(
    folder: Path, ranks: int, tensors: Mapping[str, Tensor], rest: Mapping[str, Tensor], *, in_int8: bool
) -> None:
    """tp_RR_MM.pt of each rank in eight parts, listed part by part; floats [in, out], and non-tp.pt."""
    for rank in range(ranks):
        state: dict[str, object] = {}
        for name, value in tensors.items():
            leaf = name.rpartition(".")[2]
            if leaf in ("attn_qkvw", "attn_qkvb"):
                part = torch.cat([third.chunk(ranks)[rank] for third in value.chunk(3)])
            elif leaf in ("inter_w", "inter_b"):
                part = value.chunk(ranks)[rank]
            else:
                part = value.chunk(ranks, 1)[rank] if leaf in ("attn_ow", "output_w") else value
            if part.dim() == 2 and in_int8:
                integers = int8(part)
                state[name] = [integers.values, integers.scale]
            else:
                state[name] = part.T.contiguous() if part.dim() == 2 else part.clone()
        names, size = list(state), len(state) // 8 + 1
        for part_index in range(8):
            part_names = names[part_index * size : (part_index + 1) * size]
            torch.save({name: state[name] for name in part_names}, folder / f"tp_{rank:02d}_{part_index:02d}.pt")
    torch.save(dict(rest), folder / "non-tp.pt")
    description = {
        "type": "bloom",
        "base_dir": str(folder),
        "checkpoints": {
            "non_tp": ["non-tp.pt"],
            "tp": [f"tp_{r:02d}_{m:02d}.pt" for m in range(8) for r in range(ranks)],
        },
        "version": 1.0,
        "parallelization": "tp",
        "tp_size": ranks,
        "dtype": "int8" if in_int8 else "float16",
    }
    (folder / "ds_inference_config.json").write_text(json.dumps(description))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_deepspeeds_own_shards(ranks: int, tmp_path: Path) -> None:
    tensors, rest = layer(), {"transformer.word_embeddings.weight": torch.randn(10, HIDDEN)}
    write_as_deepspeed(tmp_path, ranks, tensors, rest, in_int8=False)
    sizes = Sizes(HEADS, None, 10)
    whole = MappingCheckpoint({**tensors, **rest})
    assert_same(open_any(tmp_path, allow_pickle=True, sizes=sizes), whole)
    for rank in range(2):
        expected = TensorParallelCheckpoint([whole], INJECTED.sized(sizes), rank, 2)
        assert_same(open_any(tmp_path, allow_pickle=True, sizes=sizes, rank=rank, ranks=2), expected)


def test_deepspeeds_int8_shards_merge(tmp_path: Path) -> None:
    """Rows come with their scales; columns that were quantized on their rank become groups, where an op takes these."""
    tensors = layer()
    write_as_deepspeed(tmp_path, 2, tensors, {}, in_int8=True)
    merged = open_any(tmp_path, allow_pickle=True, sizes=Sizes(HEADS))
    rows, columns = merged.integers("transformer.h.0.mlp.inter_w"), merged.integers("transformer.h.0.mlp.output_w")
    assert rows is not None
    assert columns is not None
    straight = int8(tensors["transformer.h.0.mlp.inter_w"])
    assert torch.equal(rows.values, straight.values)
    assert torch.equal(rows.scale, straight.scale)
    halves = [int8(half) for half in tensors["transformer.h.0.mlp.output_w"].chunk(2, 1)]
    assert torch.equal(columns.values, torch.cat([half.values for half in halves], 1))
    assert torch.equal(columns.scale, torch.cat([half.scale for half in halves], 1))


def test_fused_rows_of_grouped_queries_need_the_heads(tmp_path: Path) -> None:
    write_as_deepspeed(tmp_path, 2, layer(), {}, in_int8=False)
    checkpoint = open_any(tmp_path, allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"attn_qkvw in .*tp_00_0\d\.pt, .*tp_01.*: .*give these sizes"):
        checkpoint.tensor("transformer.h.0.attention.attn_qkvw")
