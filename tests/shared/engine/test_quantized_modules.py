"""Layers of torch with quantized weights: near what they replace, equal to what their integers stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from kernels.quantization import Integers, Quantization, quantize
from shared.checkpoint import CheckpointError, MappingCheckpoint
from shared.engine.quantized_modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    embeddings_of,
    forms_of,
    linears_of,
    quantize_modules,
)
from shared.models.quantization import Scheme

FORMS = pytest.mark.parametrize(
    "how",
    [Quantization(8), Quantization(8, 16, symmetric=False), Quantization(4, 32, symmetric=False), Quantization(4)],
    ids=["int8", "int8 groups", "int4 groups", "int4"],
)


def stood_for(weight: Tensor, how: Quantization) -> Tensor:
    return Integers(how.bits, *quantize(weight, how), how.floating).dequantize()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 32)
        self.up = nn.Linear(32, 48)
        self.turned = Conv1D(32, 48)
        self.head = nn.Linear(32, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.turned(self.up(self.embed(ids))))


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_multiplies_what_its_integers_stand_for(how: Quantization, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 40).to(dtype)
    made = QuantizedLinear((40, 64), how, dtype, "cpu")
    made.take(plain.weight, plain.bias)
    x = torch.randn(3, 5, 64).to(dtype)
    weight = stood_for(plain.weight.detach(), how)
    expected = functional.linear(x.double(), weight.double(), plain.bias.double())
    y = made(x)
    assert (y.shape, y.dtype) == ((3, 5, 40), dtype)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(made.weight, weight.to(dtype))
    assert torch.equal(made(x[0, 0]), y[0, 0]), "a row by itself"
    assert made(x[:0]).shape == (0, 5, 40)


@FORMS
def test_an_embedding_looks_up_what_its_integers_stand_for(how: Quantization) -> None:
    table = torch.randn(10, 96)
    made = QuantizedEmbedding((10, 96), how, torch.float32, "cpu")
    made.take(table)
    expected = stood_for(table, how)
    ids = torch.tensor([[3, 0, 9], [9, 9, 1]])
    assert torch.equal(made(ids), expected[ids])
    assert torch.equal(made.weight, expected)
    assert made.values is not None
    assert made.values.nbytes == 10 * 96 * how.bits // 8
    odd = QuantizedEmbedding((4, 7), Quantization(4), torch.float32, "cpu")
    odd.take(table[:4, :7])
    assert torch.equal(odd.weight, stood_for(table[:4, :7], Quantization(4)))


def test_only_what_they_replace_in_full_is_replaced() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": Doubled(8, 8), "c": nn.Embedding(4, 8, max_norm=1.0)})
    assert linears_of(model) == ["a"]
    assert embeddings_of(model) == []
    assert (linears_of(Model()), embeddings_of(Model())) == (["up", "turned", "head"], ["embed"])
    with pytest.raises(ValueError, match=r"^up: 32 input features cannot be cut into groups of 24$"):
        forms_of(Model(), {"up": Scheme(Quantization(8, 24))})


def test_weights_of_a_model_or_a_checkpoint() -> None:
    """The two give the same; a tied layer is found by the other's name, and integers are taken as they are."""
    torch.manual_seed(0)
    model, how = Model(), Quantization(8)
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "head.weight"}
    forms = dict.fromkeys(("up", "turned", "head"), how)
    ids = torch.arange(6)
    expected = model(ids)
    quantized = Model()
    quantized.load_state_dict(model.state_dict())
    assert quantize_modules(quantized, forms, dtype=torch.float32, device="cpu") == set()
    assert (quantized(ids) - expected).abs().max() < 0.1 * expected.abs().max()

    stored = {**state, "up.weight": Integers(8, *quantize(state["up.weight"], how))}
    made = Model()
    made.embed.load_state_dict({"weight": state["embed.weight"]})
    made.head.weight = made.embed.weight
    read = quantize_modules(made, forms, dtype=torch.float32, device="cpu", checkpoint=MappingCheckpoint(stored))
    assert read == {"up.weight", "up.bias", "turned.weight", "turned.bias", "embed.weight"}
    assert torch.equal(made(ids), quantized(ids))

    del stored["turned.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(turned\.bias\)"):
        quantize_modules(Model(), forms, dtype=torch.float32, device="cpu", checkpoint=MappingCheckpoint(stored))
    narrow = MappingCheckpoint({**state, "up.weight": torch.ones(48, 16)})
    with pytest.raises(CheckpointError, match=r"up\.weight: wants \[48, 32\], has \[48, 16\]"):
        quantize_modules(Model(), forms, dtype=torch.float32, device="cpu", checkpoint=narrow)


def test_it_stays_where_it_is_takes_floats_and_gives_none() -> None:
    model = Model()
    floats = {name: value.clone() for name, value in model.state_dict().items()}
    quantize_modules(model, {"up": Quantization(8)}, dtype=torch.float32, device="cpu")
    assert model.to("cpu").float() is model
    for change in (model.up.half, lambda: model.up.to("meta")):
        with pytest.raises(
            RuntimeError, match=r"quantized layers compute in torch\.float32 on cpu, and cannot be made"
        ):
            change()
    with pytest.raises(RuntimeError, match="have it saved by save_mp_checkpoint_path"):
        model.state_dict()
    before = model(torch.arange(4))
    doubled = {name: 2 * value if name == "up.weight" else value for name, value in floats.items()}
    model.load_state_dict(doubled)
    assert not torch.equal(model(torch.arange(4)), before)
    with pytest.raises(RuntimeError, match=r"Missing key.*up\.weight"):
        model.load_state_dict({name: value for name, value in floats.items() if name != "up.weight"})
    with pytest.raises(RuntimeError, match=r"up\.weight: wants \[48, 32\], has \[2, 2\]"):
        model.load_state_dict({**floats, "up.weight": torch.ones(2, 2)})
    empty = QuantizedLinear((8, 8), Quantization(8), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="this layer has no weight yet"):
        empty(torch.ones(1, 8))
