"""DeepSpeed's int8 pairs: read as the integers that they are, and loaded without a float in between."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kernels.quantization import Integers
from shared.checkpoint import Checkpoint, CheckpointError, MappingCheckpoint, Sizes, open_any
from shared.checkpoint.integers import as_parts, of_pair
from shared.models.loading import load_weights
from shared.models.quantization import QuantizationPlan
from shared.policies.table import architecture_of
from tests.shared.checkpoint.test_safetensors import files_in
from tests.tiny_models import tiny_model


def group_quantized(weight: Tensor) -> list[Tensor]:
    """As DeepSpeed's GroupQuantizer stores a weight [out, in]: int8, and three sets of scales one after the other."""

    def scales(part: Tensor) -> Tensor:
        return part.reshape(len(weight), -1).abs().amax(1) * 2 / 256

    first = scales(weight)
    values = (weight / first[:, None]).round().clamp(-128, 127).to(torch.int8)
    stored = torch.cat([first, *(scales(half) for half in weight.split(weight.shape[1] // 2, 1))])
    return [values, stored.reshape(len(weight), -1)]


def test_a_pair_stands_for_its_first_scales() -> None:
    weight = torch.randn(6, 16)
    values, scale = group_quantized(weight)
    found = of_pair(values, scale)
    assert isinstance(found, Integers)
    assert torch.equal(found.values, values)
    assert torch.equal(found.scale[:, 0], weight.abs().amax(1) / 128)
    # 127 is the most, so the greatest number of a row may be a whole step off
    assert ((found.dequantize() - weight).abs() <= found.scale * 1.001).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4,), [[1.0], [2.0], [3.0], [4.0]]),
        ((4, 1), [[1.0], [2.0], [3.0], [4.0]]),
        ((8,), [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]),
        ((2,), [[1.0], [1.0], [2.0], [2.0]]),
        ((), [[1.0]] * 4),
    ],
)
def test_scales_of_groups(shape: tuple[int, ...], expected: list[list[float]]) -> None:
    count = torch.Size(shape).numel()
    found = of_pair(torch.ones(4, 8, dtype=torch.int8), torch.arange(1.0, count + 1).reshape(shape).half())
    assert isinstance(found, Integers)
    assert found.scale.tolist() == expected


@pytest.mark.parametrize("shape", [(3,), (4, 2), (0,), (4, 0), (3, 3)])
def test_scales_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        of_pair(torch.ones(4, 8, dtype=torch.int8), torch.ones(shape))


def test_a_pair_of_floats_was_never_quantized() -> None:
    bias = torch.ones(3)
    assert of_pair(bias, torch.empty(1)) is bias
    with pytest.raises(ValueError, match=r"must be \[out, in\]"):
        of_pair(torch.ones(3, dtype=torch.int8), torch.ones(3))


def test_two_tensors_of_one_name() -> None:
    integers = Integers(8, torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 1))
    with pytest.raises(CheckpointError, match=r"w\.scale is the name of two tensors"):
        as_parts({"w": integers, "w.scale": torch.ones(1)})


@pytest.fixture(scope="module")
def int8_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as DeepSpeed keeps it in int8: linears are parameters with scales, norms have unset ones."""
    folder = tmp_path_factory.mktemp("int8")
    state: dict[str, Sequence[Tensor] | Tensor] = {}
    for name, value in load_file(tiny_model("llama") / "model.safetensors").items():
        if name.endswith("proj.weight"):
            values, scale = group_quantized(value)
            parameter = nn.Parameter(values, requires_grad=False)
            parameter.scale = scale  # type: ignore[attr-defined]
            state[name] = [parameter, scale]
        else:
            state[name] = [value, torch.empty(1)] if "norm" in name else value
    torch.save(state, folder / "tp_00_00.pt")
    (folder / "config.json").write_text((tiny_model("llama") / "config.json").read_text())
    return folder


class NoFloats:
    """A checkpoint whose linears nobody may ask for as floats."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def names(self) -> set[str]:
        return self._checkpoint.names()

    def integers(self, name: str) -> Integers | None:
        return self._checkpoint.integers(name)

    def tensor(self, name: str) -> Tensor:
        assert "proj" not in name, f"{name} is read as floats"
        return self._checkpoint.tensor(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loads_in_int8_without_floats(int8_model: Path, dtype: torch.dtype) -> None:
    source = {
        "type": "ds_model",
        "checkpoints": ["tp_00_00.pt"],
        "version": 1.0,
        "base_dir": str(int8_model),
        "dtype": "int8",
    }
    checkpoint = open_any(source, allow_pickle=True)
    architecture = architecture_of(files_in(tiny_model("llama")).config)
    weights = load_weights(
        architecture, NoFloats(checkpoint), dtype=dtype, device="cpu", quantization=QuantizationPlan.of_mode("int8")
    )
    original = load_file(tiny_model("llama") / "model.safetensors")
    for index, layer in enumerate(weights.layers):
        expected = _pair(original[f"model.layers.{index}.mlp.down_proj.weight"]).dequantize()
        assert torch.equal(layer.down.dequantize(), expected)
        parts = [_pair(original[f"model.layers.{index}.self_attn.{name}_proj.weight"]) for name in "qkv"]
        assert torch.equal(layer.qkv.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_int8_shards_merge_and_split(int8_model: Path, tmp_path: Path) -> None:
    """Of which DeepSpeed does the one not at all, and the other by scales that the integers were not rounded with."""
    whole = open_any(int8_model / "tp_00_00.pt", allow_pickle=True)
    sizes = Sizes(4, 2, 384)
    for rank in range(2):
        part = open_any(int8_model / "tp_00_00.pt", allow_pickle=True, sizes=sizes, rank=rank, ranks=2)
        state = {}
        for name in part.names():
            integers = part.integers(name)
            state[name] = part.tensor(name).clone() if integers is None else [integers.values, integers.scale]
        torch.save(state, tmp_path / f"tp_{rank:02d}_00.pt")
    listed = {"tp": ["tp_00_00.pt", "tp_01_00.pt"]}
    description = {"type": "ds_model", "checkpoints": listed, "version": 1.0, "base_dir": str(tmp_path)}
    merged = open_any(description, allow_pickle=True, sizes=sizes)
    assert merged.names() == whole.names()
    for name in whole.names():
        assert torch.equal(merged.tensor(name), whole.tensor(name)), name
        found, expected = merged.integers(name), whole.integers(name)
        assert (found is None) == (expected is None), name
        if found is not None and expected is not None:
            assert torch.equal(found.values, expected.values)
            assert torch.equal(found.scale, expected.scale)


def _pair(weight: Tensor) -> Integers:
    found = of_pair(*group_quantized(weight))
    assert isinstance(found, Integers)
    return found


def test_parameters_in_memory() -> None:
    integers = Integers(8, torch.full((2, 8), 3, dtype=torch.int8), torch.tensor([[0.5], [2.0]]))
    checkpoint = MappingCheckpoint({"w": integers, "b": torch.ones(2)})
    assert checkpoint.integers("w") is integers
    assert checkpoint.integers("b") is None
    assert checkpoint.tensor("w")[:, 0].tolist() == [1.5, 6.0]
