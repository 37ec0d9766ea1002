"""Which of a model's weights are quantized, and how."""

from __future__ import annotations

from typing import get_args

import pytest

from kernels.quantization import Quantization
from shared.config import QuantizationMode
from shared.model_files import read_json
from shared.models.quantization import QuantizationPlan, Scheme, quantizable
from shared.policies.table import architecture_of
from tests.tiny_models import tiny_model

FORMS = {
    "none": None,
    "int8": Quantization(8),
    "int8_dynamic": Quantization(8, dynamic=True),
    "int4": Quantization(4, 32, symmetric=False),
    "fp8": Quantization(8, floating=True),
    "fp6": Quantization(6, floating=True),
}


@pytest.mark.parametrize("mode", get_args(QuantizationMode))
def test_a_mode_is_a_form_of_the_layers_linears_and_int8_of_the_output_layer(mode: QuantizationMode) -> None:
    plan = QuantizationPlan.of_mode(mode)
    assert plan.of("layers.3.down", 1536) == FORMS[mode]
    assert plan.of("lm_head", 576) == (None if mode == "none" else Quantization(8))
    assert plan.is_plain == (mode == "none")


def test_what_is_excluded_stays_as_it_is() -> None:
    plan = QuantizationPlan.of_mode("int8", ("lm_head", "layers.1.*", "*.down"))
    left = {"lm_head", "layers.1.qkv", "layers.1.experts_up", "layers.0.down"}
    for name in (*left, "layers.0.qkv", "layers.10.up", "layers.0.shared_down"):
        assert (plan.of(name, 64) is None) == (name in left), name
    architecture = architecture_of(read_json(tiny_model("qwen2_moe") / "config.json"))
    assert plan.unmatched(architecture) == []
    wrong = QuantizationPlan.of_mode("int8", ("embedding", "*.router", "layers.7.*", "layers.?.shared_up"))
    assert wrong.unmatched(architecture) == ["*.router", "embedding", "layers.7.*"]
    names = list(quantizable(architecture))
    assert names[:2] == ["layers.0.qkv", "layers.0.output"]
    assert {"layers.1.up", "layers.2.experts_down", "layers.2.shared_up", "lm_head"} < set(names)
    assert not {"layers.0.up", "layers.0.router", "layers.0.shared_gate", "embedding"} & set(names)


def test_a_weight_of_its_own_form_has_it_whatever_else_is_said() -> None:
    own = {"layers.0.up": Scheme(Quantization(4, 64)), "layers.0.qkv": None}
    plan = QuantizationPlan(Scheme(Quantization(8)), exclude=("*.up",), own=own)
    names = ("layers.0.up", "layers.0.qkv", "layers.1.up", "layers.1.qkv")
    assert [plan.of(name, 128) for name in names] == [Quantization(4, 64), None, None, Quantization(8)]
    assert QuantizationPlan(own={"layers.0.qkv": None}).is_plain
    assert not QuantizationPlan(own=own).is_plain


def test_rows_that_the_group_does_not_divide() -> None:
    fixed, adapting = (Scheme(Quantization(4, 32), adapts=adapts) for adapts in (False, True))
    assert [adapting.of(width).group for width in (64, 80, 72, 100, 9)] == [32, 16, 8, None, None]
    assert fixed.of(96).group == 32
    with pytest.raises(ValueError, match=r"^layers\.0\.down: 80 input features cannot be cut into groups of 32$"):
        QuantizationPlan(fixed).of("layers.0.down", 80)
    halves = Scheme(Quantization(8), groups=2)
    assert [halves.of(width).group for width in (16, 48)] == [8, 24]
    with pytest.raises(ValueError, match="81 input features cannot be cut into 2 groups"):
        halves.of(81)


def test_the_ragged_engines_fp6_is_that_of_linears_without_experts_and_the_output_layer() -> None:
    plan = QuantizationPlan.of_ragged("wf6af16")
    for module in ("qkv", "output", "up", "down", "shared_up"):
        assert plan.of(f"layers.0.{module}", 64) == Quantization(6, floating=True)
    for name in ("layers.0.experts_up", "layers.0.experts_down", "lm_head"):
        assert plan.of(name, 64) is None
    assert QuantizationPlan.of_ragged(None).is_plain
    with pytest.raises(ValueError, match="Unsupported quantization mode: int3; wf6af16 is the one there is"):
        QuantizationPlan.of_ragged("int3")
