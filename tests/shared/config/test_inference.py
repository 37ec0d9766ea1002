"""DeepSpeed's options: every field, alias, default and deprecated name, what is refused, and how options are merged."""

from __future__ import annotations

import copy
import json
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

import shared.config
from shared.config import (
    ActivationQuantConfig,
    CheckpointConfig,
    GroupQuantConfig,
    InferenceConfig,
    MoeConfig,
    QkvQuantConfig,
    QuantizationConfig,
    TensorParallelConfig,
    WeightQuantConfig,
)
from shared.config import inference as module
from shared.config.options import Options
from shared.policies.table import POLICIES

POLICY = POLICIES["llama"]
BASE_QUANT = {
    "enabled": (None, True),
    "num_bits": (None, 8),
    "q_type": (None, "symmetric"),
    "q_groups": (None, 1),
}
# class → field → (alias, default)
FIELDS: dict[type[Options], dict[str, tuple[str | None, Any]]] = {
    InferenceConfig: {
        "replace_with_kernel_inject": ("kernel_inject", False),
        "dtype": (None, torch.float16),
        "tensor_parallel": ("tp", TensorParallelConfig()),
        "enable_cuda_graph": (None, False),
        "use_triton": (None, False),
        "triton_autotune": (None, False),
        "zero": (None, {}),
        "triangular_masking": ("tm", True),
        "moe": (None, MoeConfig()),
        "keep_module_on_host": (None, False),
        "quant": (None, QuantizationConfig()),
        "checkpoint": (None, None),
        "base_dir": (None, ""),
        "set_empty_params": (None, False),
        "save_mp_checkpoint_path": (None, None),
        "checkpoint_config": ("ckpt_config", CheckpointConfig()),
        "return_tuple": (None, True),
        "training_mp_size": (None, 1),
        "injection_policy": ("injection_dict", None),
        "injection_policy_tuple": (None, None),
        "config": ("args", None),
        "max_out_tokens": ("max_tokens", 1024),
        "min_out_tokens": ("min_tokens", 1),
        "transposed_mode": ("transposed_mode", False),
    },
    TensorParallelConfig: {
        "enabled": (None, True),
        "tp_size": (None, 1),
        "tp_grain_size": (None, 64),
        "mpu": (None, None),
        "tp_group": (None, None),
    },
    MoeConfig: {
        "enabled": (None, True),
        "ep_size": (None, 1),
        "moe_experts": ("num_experts", [1]),
        "type": (None, "standard"),
        "ep_mp_group": (None, None),
        "ep_group": ("expert_group", None),
    },
    ActivationQuantConfig: {**BASE_QUANT, "dynamic": (None, False)},
    GroupQuantConfig: {
        "num_bits": (None, 8),
        "group_size": (None, None),
        "group_dim": (None, 1),
        "symmetric": (None, False),
    },
    WeightQuantConfig: {**BASE_QUANT, "quantized_initialization": (None, {}), "post_init_quant": (None, {})},
    QkvQuantConfig: {"enabled": (None, True)},
    QuantizationConfig: {
        "enabled": (None, True),
        "activation": (None, ActivationQuantConfig()),
        "weight": (None, WeightQuantConfig()),
        "qkv": (None, QkvQuantConfig()),
    },
    CheckpointConfig: {
        "checkpoint_dir": (None, None),
        "save_mp_checkpoint_path": (None, None),
        "base_dir": (None, None),
        "tag": (None, None),
        "allow_pickle": (None, False),
    },
}
GROUP = SimpleNamespace(size=lambda: 2)
# deprecated name → (alias, what stands for it, a value that is not its default)
MOVED = {
    "mp_size": (None, "tensor_parallel.tp_size", 2),
    "mpu": (
        None,
        "tensor_parallel.mpu",
        SimpleNamespace(
            **{
                f"get_{kind}_parallel_{what}": lambda: 1
                for kind in ("model", "data")
                for what in ("rank", "group", "world_size")
            }
        ),
    ),
    "ep_size": (None, "moe.ep_size", 2),
    "ep_group": ("expert_group", "moe.ep_group", object()),
    "ep_mp_group": ("expert_mp_group", "moe.ep_mp_group", object()),
    "moe_experts": (None, "moe.moe_experts", [4, 8]),
    "moe_type": (None, "moe.type", "residual"),
}


def at(config: Options, path: str) -> Any:
    return reduce(getattr, path.split("."), config)


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} of a.b."""
    first, _, rest = path.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize("options", FIELDS, ids=lambda options: options.__name__)
def test_every_field_has_its_alias_and_default(options: type[Options]):
    found = {
        name: (field.alias, field.get_default(call_default_factory=True, validated_data={}))
        for name, field in options.model_fields.items()
    }
    assert found == FIELDS[options]
    made = options()
    assert {name: getattr(made, name) for name in found} == {name: default for name, (_, default) in found.items()}
    assert not made.model_fields_set
    assert not [name for name, field in options.model_fields.items() if not field.description]


@pytest.mark.parametrize(
    ("options", "name", "alias", "value"),
    [
        (InferenceConfig, "replace_with_kernel_inject", "kernel_inject", True),
        (InferenceConfig, "tensor_parallel", "tp", {"tp_size": 2}),
        (InferenceConfig, "triangular_masking", "tm", False),
        (InferenceConfig, "checkpoint_config", "ckpt_config", {"checkpoint_dir": "x"}),
        (InferenceConfig, "injection_policy", "injection_dict", {torch.nn.Linear: ("x",)}),
        (InferenceConfig, "config", "args", {"x": 1}),
        (InferenceConfig, "max_out_tokens", "max_tokens", 7),
        (InferenceConfig, "min_out_tokens", "min_tokens", 7),
        (InferenceConfig, "transposed_mode", "transposed_mode", False),
        (MoeConfig, "moe_experts", "num_experts", [7]),
        (MoeConfig, "ep_group", "expert_group", object()),
    ],
)
def test_a_field_is_given_by_its_name_or_its_alias(options: type[Options], name: str, alias: str, value: Any):
    assert FIELDS[options][name][0] == alias
    one, other = options(**{name: value}), options(**{alias: value})
    assert one == other
    assert one.model_fields_set == {name}
    assert one != options() or value is False


def test_two_spellings_of_a_field_may_not_differ():
    assert InferenceConfig(max_tokens=5, max_out_tokens=5).max_out_tokens == 5
    with pytest.raises(ValidationError, match="Conflicting argument 'max_out_tokens': max_out_tokens is given two"):
        InferenceConfig(max_tokens=5, max_out_tokens=6)


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float16, "float16 fp16 half torch.float16 torch.half"),
        (torch.bfloat16, "bfloat16 bf16 bfloat torch.bfloat16"),
        (torch.float32, "float32 fp32 float torch.float32 torch.float"),
        (torch.int8, "int8 torch.int8"),
    ],
)
def test_dtype_by_any_of_its_names(dtype: torch.dtype, names: str):
    for given_as in (dtype, *names.split()):
        config = InferenceConfig(dtype=given_as)
        assert config.dtype is dtype
        assert config.model_dump()["dtype"] == str(dtype)
        assert json.loads(config.model_dump_json())["dtype"] == str(dtype)


@pytest.mark.parametrize("dtype", ["fp64", "torch.fp16", "", "FP16", torch.float64, torch.uint8])
def test_another_dtype_is_refused(dtype: Any):
    with pytest.raises(ValidationError, match=f"'{dtype}' is not a valid dtype: float16, bfloat16, float32, int8 are"):
        InferenceConfig(dtype=dtype)


@pytest.mark.parametrize("dtype", [16, None, b"fp16", float])
def test_what_is_no_dtype_at_all_is_a_type_error(dtype: Any):
    with pytest.raises(TypeError, match="Invalid type for dtype: "):
        InferenceConfig(dtype=dtype)


@pytest.mark.parametrize("name", MOVED)
def test_a_deprecated_name_warns_and_its_value_moves(name: str):
    alias, to, value = MOVED[name]
    for spelled in filter(None, (name, alias)):
        with pytest.warns(DeprecationWarning, match=f"^{name} is deprecated; give {to} instead$") as warned:
            config = InferenceConfig(**{spelled: value})
        assert [warning.filename for warning in warned] == [__file__]
        assert at(config, to) == value
        assert config == InferenceConfig(**nested(to, value))
        assert not hasattr(config, name)
        assert name not in config.model_dump()


@pytest.mark.parametrize("name", MOVED)
def test_a_deprecated_name_beside_the_new_one_is_refused(name: str):
    _, to, value = MOVED[name]
    default = at(InferenceConfig(), to)
    message = f"Cannot provide deprecated parameter '{name}' and replacing parameter '{to}' together"
    for old, new in ((value, default), (default, value), (default, default)):
        with pytest.raises(ValidationError, match=message):
            InferenceConfig(**{name: old}, **nested(to, new))


def test_a_deprecated_name_set_to_its_default_is_set():
    with pytest.warns(DeprecationWarning, match="mp_size is deprecated"):
        config = InferenceConfig(mp_size=1)
    assert config.tensor_parallel.model_fields_set == {"tp_size"}


def test_a_deprecated_name_fits_in_beside_other_fields_of_its_section():
    section = TensorParallelConfig(tp_grain_size=32)
    for given_as in (section, {"tp_grain_size": 32}):
        with pytest.warns(DeprecationWarning, match="mp_size"):
            config = InferenceConfig(tp=given_as, mp_size=2)
        assert config.tensor_parallel == TensorParallelConfig(tp_size=2, tp_grain_size=32)
    assert section == TensorParallelConfig(tp_grain_size=32)
    with pytest.warns(DeprecationWarning, match="ep_size"):
        assert InferenceConfig(moe=True, ep_size=2).moe == MoeConfig(enabled=True, ep_size=2)
    with pytest.raises(ValidationError, match="tensor_parallel"):
        InferenceConfig(tp=3, mp_size=2)
    with (
        pytest.warns(DeprecationWarning, match="mp_size"),
        pytest.raises(ValidationError, match=r"tensor_parallel\.tp_size"),
    ):
        InferenceConfig(mp_size=0)


def test_replace_method_is_deprecated_and_auto_alone():
    with pytest.warns(DeprecationWarning, match="replace_method is deprecated and has no effect; leave it out"):
        assert InferenceConfig(replace_method="auto") == InferenceConfig()
    with pytest.raises(ValidationError, match="replace_method: 'manual' is not supported"):
        InferenceConfig(replace_method="manual")


def test_a_deprecation_is_told_of_the_callers_line(tmp_path: Path):
    path = tmp_path / "options.json"
    path.write_text('{"mp_size": 2}')
    for give in (
        lambda: InferenceConfig.of({"mp_size": 2}),
        lambda: InferenceConfig.of(mp_size=2),
        lambda: InferenceConfig.of(path),
        lambda: InferenceConfig.model_validate({"mp_size": 2}),
    ):
        with pytest.warns(DeprecationWarning, match="mp_size") as warned:
            assert give().tensor_parallel.tp_size == 2
        assert [warning.filename for warning in warned] == [__file__]


def test_auto_is_as_good_as_none():
    options = {"max_tokens": "auto", "dtype": "auto", "tp": {"tp_size": "auto"}, "moe": "auto", "mp_size": "auto"}
    assert InferenceConfig(**options) == InferenceConfig()
    assert TensorParallelConfig(tp_size="auto") == TensorParallelConfig()
    config = InferenceConfig(save_mp_checkpoint_path="auto", ckpt_config={"checkpoint_dir": "auto"})
    assert config == InferenceConfig()


def test_strict_takes_auto_for_a_value():
    section = {"checkpoint_dir": "auto"}
    config = InferenceConfig(strict=True, save_mp_checkpoint_path="auto", ckpt_config=section)
    assert (config.save_mp_checkpoint_path, config.checkpoint) == ("auto", "auto")
    assert section == {"checkpoint_dir": "auto"}
    config.max_out_tokens = 5
    assert config.save_mp_checkpoint_path == "auto"
    assert InferenceConfig.of({"base_dir": "auto", "checkpoint": "x"}, strict=True).base_dir == "auto"
    more = InferenceConfig.of(config, tp={"tp_size": "auto"}, dtype="auto")
    assert (more.save_mp_checkpoint_path, more.tensor_parallel.tp_size, more.dtype) == ("auto", 1, torch.float16)
    for options in ({"max_tokens": "auto"}, {"tp": {"tp_size": "auto"}}, {"dtype": "auto"}):
        with pytest.raises(ValidationError, match=r"max_out_tokens|tp_size|'auto' is not a valid dtype"):
            InferenceConfig(strict=True, **options)
    with pytest.raises(ValidationError, match="strict: wants true or false, has 1"):
        InferenceConfig(strict=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strict: wants true or false, has 'no'"):
        InferenceConfig.of({"strict": "no"})
    with pytest.raises(ValueError, match="Conflicting argument 'strict'"):
        InferenceConfig.of({"strict": True}, strict=False)


def test_moe_as_a_flag():
    assert InferenceConfig(moe=True).moe == MoeConfig(enabled=True)
    assert InferenceConfig(moe=False).moe == MoeConfig(enabled=False)
    config = InferenceConfig()
    config.moe = False
    assert config.moe == MoeConfig(enabled=False)
    assert InferenceConfig.of({"moe": False}, moe={"enabled": False}).moe == MoeConfig(enabled=False)


def test_checkpoint_config_says_the_same_as_the_fields():
    nested_form = InferenceConfig(
        ckpt_config={"checkpoint_dir": "a", "save_mp_checkpoint_path": "b", "base_dir": "c"},
    )
    assert (nested_form.checkpoint, nested_form.save_mp_checkpoint_path, nested_form.base_dir) == ("a", "b", "c")
    both = InferenceConfig(checkpoint="a", ckpt_config={"checkpoint_dir": "a"})
    assert both.checkpoint == "a"
    nested_form.checkpoint_config.checkpoint_dir = "d"
    nested_form.check_supported()
    assert nested_form.checkpoint == "d"
    nested_form.checkpoint_config = {"checkpoint_dir": "e"}  # type: ignore[assignment]
    assert (nested_form.checkpoint, nested_form.save_mp_checkpoint_path, nested_form.base_dir) == ("e", None, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_injct": True}, r"kernel_injct\n.*not permitted"),
        ({"tp": {"size": 2}}, r"tensor_parallel\.size\n.*not permitted"),
        # sizes
        ({"tp": {"tp_size": 0}}, r"tensor_parallel\.tp_size\n.*greater than or equal to 1"),
        ({"tp": {"tp_size": -1}}, r"tensor_parallel\.tp_size\n.*greater than or equal to 1"),
        ({"tp": {"tp_grain_size": 0}}, r"tensor_parallel\.tp_grain_size\n.*greater than or equal to 1"),
        ({"moe": {"ep_size": 0}}, r"moe\.ep_size\n.*greater than or equal to 1"),
        ({"moe": {"num_experts": [4, 0]}}, r"moe\.moe_experts\.1\n.*greater than or equal to 1"),
        ({"moe": {"moe_experts": []}}, r"moe\.moe_experts\n.*at least 1 item"),
        ({"moe": {"type": "sparse"}}, r"moe\.type\n.*'standard' or 'residual'"),
        ({"max_tokens": 0}, r"max_out_tokens\n.*greater than or equal to 1"),
        ({"min_out_tokens": 0}, r"min_out_tokens\n.*greater than or equal to 1"),
        ({"training_mp_size": 0}, r"training_mp_size\n.*0 is refused: a checkpoint's files tell the degree"),
        ({"quant": {"weight": {"num_bits": 5}}}, r"quant\.weight\.num_bits\n.*4, 6 or 8"),
        (
            {"quant": {"weight": {"num_bits": 6}}},
            r"quant\.weight\n.*num_bits: 6, and q_type is symmetric: int",
        ),
        ({"quant": {"weight": {"num_bits": 4, "q_type": "float"}}}, "num_bits: 4, and q_type is float: .* floats 6 or"),
        ({"quant": {"weight": {"q_groups": 0}}}, r"quant\.weight\.q_groups\n.*greater than or equal to 1"),
        ({"quant": {"weight": {"q_type": "log"}}}, r"quant\.weight\.q_type\n.*'symmetric', 'asymmetric' or 'float'"),
        ({"quant": {"activation": {"num_bits": 4}}}, r"quant\.activation\.num_bits\n.*4 is refused: rows become int8"),
        (
            {"quant": {"activation": {"q_groups": 2}}},
            r"quant\.activation\.q_groups\n.*2 is refused: a row has one",
        ),
        (
            {"quant": {"activation": {"q_type": "asymmetric"}}},
            r"quant\.activation\.q_type\n.*'asymmetric' is refused: rows become int8 around zero",
        ),
        (
            {"quant": {"weight": {"quantized_initialization": {"num_bits": 6}}}},
            r"quant\.weight\.quantized_initialization\.num_bits\n.*4 or 8",
        ),
        (
            {"quant": {"weight": {"post_init_quant": {"mlp": {"group_dim": 0}}}}},
            r"quant\.weight\.post_init_quant\.mlp\.group_dim\n.*0 is refused: a scale is for input features of",
        ),
        (
            {"quant": {"weight": {"post_init_quant": {"mlp": 8}}}},
            r"quant\.weight\.post_init_quant\.mlp\n.*dictionary or instance of GroupQuantConfig",
        ),
        ({"max_tokens": 4, "min_tokens": 5}, r"min_out_tokens: 5 exceeds max_out_tokens \(4\); lower the one"),
        # what would do nothing
        ({"triton_autotune": True}, r"triton_autotune\n.*True is refused: tiles are fixed"),
        ({"zero": {"stage": 3}}, r"zero\n.*\{'stage': 3\} is refused: ZeRO"),
        ({"return_tuple": False}, r"return_tuple\n.*False is refused: forward returns the model's own type"),
        ({"training_mp_size": 2}, r"training_mp_size\n.*2 is refused: a checkpoint's files tell the degree"),
        ({"transposed_mode": True}, r"transposed_mode\n.*True is refused: the policy of a model's family"),
        ({"injection_policy_tuple": ("x",)}, r"injection_policy_tuple\n.*give them there"),
        ({"base_dir": "x"}, "base_dir: 'x', and no checkpoint has its files there; name it, too"),
        # contradictions
        (
            {"enable_cuda_graph": True, "tp": {"tp_size": 2}},
            "enable_cuda_graph: Cuda graph is not supported for model parallelism, and tensor_parallel.tp_size is 2",
        ),
        (
            {"kernel_inject": True, "injection_dict": {torch.nn.Linear: "x"}},
            "injection_policy: .* replace_with_kernel_inject replaces them; leave one of them out, or give a Policy",
        ),
        ({"tp": {"enabled": False, "tp_size": 2}}, r"tensor_parallel\n.*enabled: false, and tp_size is 2; leave one"),
        ({"moe": {"enabled": False, "ep_size": 2}}, r"moe\n.*enabled: false, and ep_size is 2; leave one"),
        ({"dtype": "int8", "quant": {"enabled": False}}, "quant.enabled: false, and dtype is int8; leave it out"),
        (
            {"dtype": "int8", "quant": {"weight": {"enabled": False}}},
            "quant.weight.enabled: false, and dtype is int8; leave it out",
        ),
        (
            {"quant": {"enabled": False, "weight": {"post_init_quant": {"mlp": {}}}}},
            r"quant\.enabled: false, and quant\.weight\.post_init_quant is given; leave it out",
        ),
        (
            {"dtype": "int8", "quant": {"weight": {"quantized_initialization": {"num_bits": 4}}}},
            r"quant\.weight\.quantized_initialization: given, and so is dtype int8; each says how",
        ),
        (
            {"quant": {"weight": {"quantized_initialization": {"num_bits": 4}, "post_init_quant": {"mlp": {}}}}},
            r"quant\.weight\.quantized_initialization: given, and so is quant\.weight\.post_init_quant; each says",
        ),
        (
            {"dtype": "bf16", "quant": {"weight": {"num_bits": 4}}},
            r"quant\.weight: 4 bits, symmetric, q_groups 1, and dtype is bfloat16, which quantizes nothing by it; give",
        ),
        (
            {"dtype": "bf16", "quant": {"activation": {"dynamic": True}}},
            r"quant\.activation\.dynamic: true, and dtype is bfloat16; give dtype int8",
        ),
        (
            {"dtype": "int8", "quant": {"activation": {"dynamic": True, "enabled": False}}},
            r"quant\.activation\.dynamic: true, and enabled is false; leave one of them out",
        ),
        *(
            (
                {"dtype": "int8", "quant": {"activation": {"dynamic": True}, "weight": weight}},
                "dynamic: .* is not int8, ",
            )
            for weight in ({"num_bits": 4}, {"q_type": "asymmetric"}, {"q_groups": 2}, {"q_type": "float"})
        ),
        (
            {"checkpoint": "a", "ckpt_config": {"checkpoint_dir": "b"}},
            "checkpoint: 'a', and checkpoint_config.checkpoint_dir is 'b'; leave one of them out",
        ),
        (
            {"save_mp_checkpoint_path": "a", "ckpt_config": {"save_mp_checkpoint_path": "b"}},
            "save_mp_checkpoint_path: 'a', and checkpoint_config.save_mp_checkpoint_path is 'b'",
        ),
        (
            {"checkpoint": "x", "base_dir": "a", "ckpt_config": {"base_dir": "b"}},
            "base_dir: 'a', and checkpoint_config.base_dir is 'b'",
        ),
        ({"ckpt_config": {"tag": "t"}}, "checkpoint_config.tag: 't', and checkpoint is no folder; give the folder"),
        ({"set_empty_params": True, "checkpoint": "x"}, "set_empty_params: no weights are loaded, and checkpoint is"),
        (
            {"set_empty_params": True, "save_mp_checkpoint_path": "x"},
            "set_empty_params: no weights are loaded, and save_mp_checkpoint_path is set",
        ),
        # values of a wrong kind
        (
            {"tp": {"tp_group": object()}},
            r"tensor_parallel\n.*tp_group: wants a torch.distributed process group, has ob",
        ),
        ({"tp": {"tp_group": GROUP, "tp_size": 3}}, r"tensor_parallel\n.*tp_size: 3, and the group has 2 ranks; leave"),
        ({"tp": {"mpu": MOVED["mpu"][2], "tp_size": 2}}, r"tensor_parallel\n.*tp_size: 2, and the group has 1 ranks"),
        ({"tp": {"mpu": MOVED["mpu"][2], "tp_group": GROUP}}, r"tensor_parallel\n.*mpu: has a group, and tp_group is"),
        ({"tp": {"tp_group": GROUP, "enabled": False}}, r"tensor_parallel\n.*enabled: false, and tp_size is 2; leave"),
        ({"tp": {"tp_group": GROUP}, "enable_cuda_graph": True}, "enable_cuda_graph: Cuda graph is not supported for"),
        ({"moe": {"ep_size": 2}, "enable_cuda_graph": True}, r"Cuda graph is not supported .* and moe\.ep_size is 2"),
        ({"tp": {"mpu": object()}}, r"tensor_parallel\.mpu\n.*object has no get_model_parallel_rank, get_model_para"),
        ({"injection_policy": {"Linear": "x"}}, "'Linear' is no subclass of torch.nn.Module; give the class"),
        ({"injection_policy": {int: "x"}}, "<class 'int'> is no subclass of torch.nn.Module"),
        ({"injection_policy": {torch.nn.Linear: ()}}, r"Linear: wants the suffix .* has \(\)"),
        ({"injection_policy": {torch.nn.Linear: ("a", "")}}, "Linear: wants the suffix of a layer's name or several"),
        ({"injection_policy": {torch.nn.Linear: object}}, "Linear: wants the suffix of a layer's name or several"),
        ({"injection_policy": ["x"]}, r"injection_policy\n.*wants {module class: suffixes} or a Policy, has list"),
        ({"checkpoint": 3}, "checkpoint"),
        ({"config": "x"}, r"config\n"),
    ],
)
def test_what_is_wrong_is_refused_by_name(options: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        InferenceConfig(**options)
    with pytest.raises(ValueError, match=message):
        InferenceConfig.of(options)


@pytest.mark.parametrize(
    ("installed", "cuda", "interpreted", "message"),
    [
        (False, True, True, "Triton needs to be installed to use its kernels: pip install triton, or leave it out"),
        (True, False, False, "there is no CUDA device to run Triton's kernels; leave it out, or .*TRITON_INTERPRET=1"),
        (True, True, False, None),
        (True, False, True, None),
    ],
)
def test_triton_has_to_be_there(
    installed: bool, cuda: bool, interpreted: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "find_spec", lambda name: object() if installed and name == "triton" else None)
    monkeypatch.setattr(module, "INTERPRETED", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    if message is None:
        assert InferenceConfig(use_triton=True).use_triton
    else:
        with pytest.raises(ValidationError, match=message):
            InferenceConfig(use_triton=True)


def test_an_injection_policy_is_a_dictionary_or_a_table():
    config = InferenceConfig(injection_policy={torch.nn.Linear: "a", torch.nn.Conv1d: ["b", "c"]})
    assert config.injection_policy == {torch.nn.Linear: ("a",), torch.nn.Conv1d: ("b", "c")}
    assert InferenceConfig(injection_policy=POLICY, kernel_inject=True).injection_policy is POLICY


def test_an_injection_policy_is_dumped_where_it_can_be_read_again():
    config = InferenceConfig(injection_policy={torch.nn.Linear: "a"})
    assert InferenceConfig(**config.model_dump()) == config
    message = "injection_policy: a Policy is no plain data, and a class no JSON; exclude it from the dump"
    with pytest.raises(PydanticSerializationError, match=message):
        config.model_dump_json()
    config.injection_policy = POLICY
    with pytest.raises(PydanticSerializationError, match=message):
        config.model_dump()
    assert config.model_dump(exclude={"injection_policy"}) == InferenceConfig().model_dump(exclude={"injection_policy"})


def test_what_can_be_asked_for_passes():
    InferenceConfig().check_supported()
    InferenceConfig(
        kernel_inject=True,
        dtype="int8",
        enable_cuda_graph=True,
        triangular_masking=False,
        moe=False,
        keep_module_on_host=True,
        quant={"activation": {"enabled": False}, "weight": {"num_bits": 4, "q_groups": 2}, "qkv": {"enabled": False}},
        checkpoint={"type": "ds_model"},
        base_dir="x",
        save_mp_checkpoint_path="y",
        config={"hidden_act": "gelu"},
        max_tokens=1,
    ).check_supported()
    InferenceConfig(set_empty_params=True, injection_policy={torch.nn.Linear: "x"}).check_supported()


def test_contradictions_set_by_parts_are_found_before_loading():
    config = InferenceConfig(enable_cuda_graph=True)
    config.tensor_parallel.tp_size = 2
    with pytest.raises(ValueError, match="Cuda graph is not supported for model parallelism"):
        config.check_supported()


def test_an_assignment_is_checked_and_changes_nothing_if_refused():
    config = InferenceConfig(enable_cuda_graph=True, min_tokens=3)
    config.tensor_parallel.tp_grain_size = 32
    before = copy.deepcopy(config)
    for name, value in [
        ("max_out_tokens", 0),
        ("max_out_tokens", 2),
        ("max_out_tokens", "auto"),
        ("tensor_parallel", {"tp_size": 2}),
    ]:
        with pytest.raises(ValidationError):
            setattr(config, name, value)
        assert config == before
        assert config.model_fields_set == before.model_fields_set
    section = config.tensor_parallel
    config.max_out_tokens = 5
    config.dtype = "bf16"  # type: ignore[assignment]
    assert (config.max_out_tokens, config.min_out_tokens, config.dtype) == (5, 3, torch.bfloat16)
    assert config.tensor_parallel is section
    assert config.given() == {
        "enable_cuda_graph": True,
        "min_out_tokens": 3,
        "tensor_parallel": {"tp_grain_size": 32},
        "max_out_tokens": 5,
        "dtype": torch.bfloat16,
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_tokenz", "^max_tokenz: no field of InferenceConfig$"),
        ("strict", "^strict: no field of InferenceConfig$"),
        ("max_tokens", "^max_tokens: no field of InferenceConfig; set max_out_tokens$"),
        ("mp_size", r"^mp_size: no field of InferenceConfig; set tensor_parallel\.tp_size$"),
        ("expert_group", r"^expert_group: no field of InferenceConfig; set moe\.ep_group$"),
        ("replace_method", "^replace_method: no field of InferenceConfig$"),
    ],
)
def test_only_a_field_is_assigned_to(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        setattr(InferenceConfig(), name, True)


def test_objects_share_no_defaults():
    InferenceConfig().moe.moe_experts.append(2)
    assert InferenceConfig().moe.moe_experts == [1]


# The four ways to give options.


def test_nothing_gives_the_defaults():
    assert InferenceConfig.of() == InferenceConfig.of(None) == InferenceConfig.of({}) == InferenceConfig()


def test_a_json_file(tmp_path: Path):
    path = tmp_path / "options.json"
    path.write_text('{"dtype": "bf16", "tp": {"tp_size": 2}}')
    for given_as in (path, str(path)):
        assert InferenceConfig.of(given_as) == InferenceConfig(dtype=torch.bfloat16, tp={"tp_size": 2})
    assert InferenceConfig.of(str(path), max_tokens=5).max_out_tokens == 5
    with pytest.raises(ValueError, match="Conflicting argument 'dtype'"):
        InferenceConfig.of(path, dtype="fp32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "options.json: is no JSON: "),
        ("[]", "options.json: holds no JSON object"),
        ('{"dtype": "bf16", "dtype": "fp32"}', "options.json: is no JSON: 'dtype' stands twice in one object"),
    ],
)
def test_a_file_that_holds_no_options_is_named(text: str, message: str, tmp_path: Path):
    path = tmp_path / "options.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        InferenceConfig.of(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        InferenceConfig.of(tmp_path / "nowhere")


@pytest.mark.parametrize("config", [3, ["x"], InferenceConfig, MoeConfig()])
def test_another_type_is_refused(config: Any):
    with pytest.raises(ValueError, match="'config' argument expected string or dictionary, got <class '"):
        InferenceConfig.of(config)


def test_an_object_is_taken_as_it_is():
    config = InferenceConfig(max_tokens=5)
    config.tensor_parallel.tp_size = 2
    assert InferenceConfig.of(config) is config
    more = InferenceConfig.of(config, kernel_inject=True, max_tokens=5)
    assert more == InferenceConfig(max_tokens=5, tp={"tp_size": 2}, kernel_inject=True)
    more.tensor_parallel.tp_grain_size = 32
    assert config == InferenceConfig(max_tokens=5, tp={"tp_size": 2})
    with pytest.raises(ValueError, match="Conflicting argument 'max_out_tokens' / 'max_tokens': 5 in 'config', 6 as a"):
        InferenceConfig.of(config, max_tokens=6)


@pytest.mark.parametrize(
    ("config", "kwargs"),
    [
        ({"max_tokens": 5}, {"max_out_tokens": 5}),
        ({"dtype": "fp16"}, {"dtype": torch.float16}),
        ({"dtype": "half"}, {"dtype": "torch.float16"}),
        ({"tp": {"tp_size": 2}}, {"tensor_parallel": TensorParallelConfig(tp_size=2)}),
        ({"moe": {"num_experts": [4]}}, {"moe": {"moe_experts": (4,)}}),
        ({"tp": {"tp_size": 2, "tp_grain_size": 64}}, {"tp": {"tp_size": 2}}),
        ({"max_tokens": "auto"}, {"max_tokens": 5}),
        ({"max_tokens": 5}, {"max_out_tokens": "auto"}),
    ],
)
def test_an_overlap_that_says_the_same_is_fine(config: dict[str, Any], kwargs: dict[str, Any]):
    merged = InferenceConfig.of(config, **kwargs)
    assert merged == InferenceConfig.of(kwargs, **config)
    assert merged == InferenceConfig.of(
        {name: value for name, value in {**config, **kwargs}.items() if value != "auto"}
    )
    assert merged.given()


@pytest.mark.parametrize(
    ("config", "kwargs", "keys"),
    [
        ({"max_tokens": 5}, {"max_tokens": 6}, "'max_tokens'"),
        ({"max_tokens": 5}, {"max_out_tokens": 6}, "'max_out_tokens' / 'max_tokens'"),
        ({"tp": {"tp_size": 2}}, {"tensor_parallel": {"tp_size": 3}}, "'tensor_parallel' / 'tp'"),
        ({"tp": {"tp_size": 2}}, {"tp": {"tp_size": 2, "tp_grain_size": 1}}, "'tp'"),
        ({"moe": True}, {"moe": False}, "'moe'"),
        ({"dtype": "fp16"}, {"dtype": torch.bfloat16}, "'dtype'"),
        ({"mp_size": 2}, {"mp_size": 3}, "'mp_size'"),
        ({"expert_group": "a"}, {"ep_group": "b"}, "'ep_group' / 'expert_group'"),
    ],
)
def test_a_conflict_names_the_key(config: dict[str, Any], kwargs: dict[str, Any], keys: str):
    with pytest.raises(ValueError, match=f"^Conflicting argument {keys}: .* in 'config', .* as a keyword argument"):
        InferenceConfig.of(config, **kwargs)


def test_a_deprecated_name_in_one_and_the_new_one_in_the_other_are_refused():
    with pytest.raises(ValidationError, match="Cannot provide deprecated parameter 'mp_size'"):
        InferenceConfig.of({"mp_size": 2}, tp={"tp_size": 2})


def test_nothing_of_the_callers_dictionary_is_held():
    given_as: dict[str, Any] = {"checkpoint": {"checkpoints": ["a", {"b": 1}]}, "config": {"x": [1]}}
    config = InferenceConfig.of(given_as)
    given_as["checkpoint"]["checkpoints"][1]["b"] = 2
    given_as["config"]["x"].append(2)
    assert config.checkpoint == {"checkpoints": ["a", {"b": 1}]}
    assert config.config == {"x": [1]}


MOE = st.fixed_dictionaries({}, optional={"moe_experts": st.lists(st.integers(1, 2), min_size=1)})
TENSOR_PARALLEL = st.fixed_dictionaries({}, optional={"tp_size": st.integers(1, 3), "tp_grain_size": st.just(32)})
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "replace_with_kernel_inject": st.booleans(),
        "max_out_tokens": st.integers(1, 3) | st.just("auto"),
        "min_out_tokens": st.just(1) | st.just("auto"),
        "dtype": st.sampled_from(["fp16", "half", torch.float16, "bf16", torch.int8, "auto"]),
        "tensor_parallel": TENSOR_PARALLEL,
        "moe": st.booleans()
        | st.fixed_dictionaries({}, optional={"moe_experts": st.lists(st.integers(1, 2), min_size=1)}),
        "checkpoint": st.none() | st.fixed_dictionaries({"checkpoints": st.lists(st.text(max_size=2), max_size=2)}),
        "config": st.none() | st.dictionaries(st.text(max_size=2), st.lists(st.integers(), max_size=2), max_size=2),
    },
)
# by its own name, `config` would be the dictionary that `of` takes
SPELLED = {"config": "args"}
ALIASES = {name: alias for name, (alias, _) in FIELDS[InferenceConfig].items() if alias}


@settings(max_examples=60, deadline=None)
@given(OPTIONS, OPTIONS, st.sets(st.sampled_from(sorted(ALIASES))))
def test_merging_is_the_union_or_names_a_conflict(config: dict[str, Any], kwargs: dict[str, Any], by_alias: set[str]):
    spelled = {ALIASES[name] if name in by_alias else name: value for name, value in config.items()}
    keywords = {SPELLED.get(name, name): value for name, value in kwargs.items()}
    before = copy.deepcopy((spelled, keywords))
    alone = [{name: InferenceConfig.of({name: value}) for name, value in side.items()} for side in (config, kwargs)]
    differing = [
        name
        for name in config.keys() & kwargs.keys()
        if "auto" not in (config[name], kwargs[name]) and alone[0][name] != alone[1][name]
    ]
    if differing:
        with pytest.raises(ValueError, match=r"^Conflicting argument ") as error:
            InferenceConfig.of(spelled, **keywords)
        told = str(error.value).partition(":")[0]
        assert any(f"'{key}'" in told for name in differing for key in (name, ALIASES.get(name)))
    else:
        both = {**config, **{name: value for name, value in kwargs.items() if value != "auto" or name not in config}}
        assert InferenceConfig.of(spelled, **keywords) == InferenceConfig(**both)
    assert (spelled, keywords) == before


@settings(max_examples=100, deadline=None)
@given(OPTIONS)
def test_options_survive_a_dump(options: dict[str, Any]):
    config = InferenceConfig.of(options)
    assert InferenceConfig.model_validate(config.model_dump()) == config
    assert InferenceConfig.model_validate(config.model_dump(by_alias=True)) == config
    assert InferenceConfig.model_validate_json(config.model_dump_json()) == config
    assert InferenceConfig.of(config.model_dump(exclude_unset=True)) == config


def test_an_unknown_name_of_the_package_is_told():
    with pytest.raises(AttributeError, match=r"module 'shared\.config' has no attribute 'nothing'"):
        shared.config.nothing  # type: ignore[attr-defined]  # noqa: B018
