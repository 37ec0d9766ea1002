"""docs/deepspeed.md says of every option what the classes say: its aliases, its default, and whether it is taken."""

from __future__ import annotations

import functools
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tandem.v1.types_pb2 import SamplingParams

import shared.config
from shared.config import InferenceConfig, TandemConfig, modules
from shared.config.options import Options
from shared.engine.modules import registry

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/deepspeed.md").read_text()
STATES = {"works", "works better", "refused"}
CLASSES = (
    "InferenceConfig",
    "GroupQuantConfig",
    "RaggedEngineConfig",
    "KvCacheConfig",
    "SelfAttentionConfig",
    "RotateHalfConfig",
    "LinearConfig",
    "NormConfig",
    "MoeModuleConfig",
    "EmbeddingsConfig",
    "UnembedConfig",
)

# what MII's classes have
MII = {
    "ModelConfig": (
        "model_name_or_path tokenizer task tensor_parallel quantization_mode inference_engine_config torch_dist_port "
        "zmq_port_number replica_num replica_configs device_map max_length sync_debug profile_model_time"
    ),
    "ReplicaConfig": "hostname tensor_parallel_ports torch_dist_port zmq_port gpu_indices",
    "MIIConfig": (
        "deployment_name deployment_type model_conf port_number enable_restful_api restful_api_host restful_api_port "
        "restful_processes hostfile version instance_type"
    ),
    "GenerateParamsConfig": (
        "prompt_length max_length max_new_tokens min_new_tokens stream ignore_eos return_full_text do_sample top_p "
        "top_k temperature stop"
    ),
}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without those of its head, which has as many."""
    _, found, rest = f"\n{PAGE}".partition(f"\n{heading}\n")
    assert found, f"docs/deepspeed.md has no heading {heading!r}"
    lines = [line for line in re.split(r"\n#", rest)[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(set(map(len, cells))) <= 1, f"{heading}: a row has more cells than its head, or fewer"
    return cells[2:]


def fields(options: type[Options], prefix: str = "") -> list[list[str]]:
    """[name, alias, default] of each field, as the page writes them; of a section, its own fields after it."""
    found: list[list[str]] = []
    for name, field in options.model_fields.items():
        alias = f"`{field.alias}`" if field.alias else ""
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Options):
            found += [[f"`{prefix}{name}`", alias, ""], *fields(section, f"{prefix}{name}.")]
        else:
            default = field.get_default(call_default_factory=True, validated_data={})
            found.append([f"`{prefix}{name}`", alias, "required" if field.is_required() else f"`{default!r}`"])
    return found


def options_of(name: str) -> type[Options]:
    return getattr(shared.config, name, None) or getattr(modules, name)


def in_state(state: str) -> list[str]:
    return [cells[0].strip("`") for cells in rows("### `InferenceConfig`") if cells[3] == state]


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_has_its_row_and_no_row_is_invented(name: str):
    assert [cells[:3] for cells in rows(f"### `{name}`")] == fields(options_of(name))


def test_every_class_has_its_table():
    def parts(options: type[Options]) -> set[type[Options]]:
        sections = {kind for field in options.model_fields.values() if isinstance(kind := field.annotation, type)}
        return {options}.union(*(parts(kind) for kind in sections if issubclass(kind, Options)))

    def leaves(kind: type[Options]) -> set[type[Options]]:
        return {kind}.union(*map(leaves, kind.__subclasses__()))

    shown = set[type[Options]]().union(*(parts(options_of(name)) for name in CLASSES))
    bases = {kind for kind in leaves(Options) if kind.__subclasses__()}
    assert leaves(Options) - bases == {kind for kind in shown if kind.__module__.startswith("shared.config")} - bases


def test_deprecated_names_have_their_rows():
    assert [cells[:3] for cells in rows("### Deprecated names")] == [
        [f"`{name}`", f"`{old.alias}`" if old.alias else "", f"`{old.to}`" if old.to else ""]
        for name, old in InferenceConfig.deprecated.items()
    ]


def test_what_is_refused_takes_its_default_alone():
    refused = in_state("refused")
    assert refused
    for name in refused:
        default = functools.reduce(getattr, name.split("."), InferenceConfig())
        other: Any = {bool: not default, int: 2, str: "x", dict: {"x": 1}, type(None): ("x",)}[type(default)]
        with pytest.raises(ValidationError, match=f"{name}\n.* is refused: "):
            InferenceConfig(**nested(name, other))
        assert InferenceConfig(**nested(name, default)) == InferenceConfig()


def nested(name: str, value: object) -> dict[str, Any]:
    """A field, perhaps of a section, as it is given."""
    return functools.reduce(lambda inner, part: {part: inner}, reversed(name.split(".")), value)  # type: ignore[return-value]


def test_every_row_is_in_a_state_and_tells_what_it_has_to():
    seen, headings = 0, re.findall(r"(?m)^#+ .*$", PAGE)
    assert len(set(headings)) == len(headings), "a heading is there twice"
    for heading in headings:
        for cells in rows(heading):
            state, how = cells[-2], cells[-1]
            if state in STATES and len(cells) == 2:  # the table of the states themselves
                continue
            assert state in STATES, f"{heading}: {cells[0]}: {state!r} is no state"
            assert how or state == "works", f"{heading}: {cells[0]}: {state}, and the row does not say how"
            seen += 1
    assert seen > 350


@pytest.mark.parametrize("name", MII)
def test_every_option_of_mii_has_its_row_and_what_it_is_here_exists(name: str):
    found = rows(f"### `{name}`")
    assert sorted(word for cells in found for word in re.findall(r"`(\w+)`", cells[0])) == sorted(MII[name].split())
    here = [word for cells in found for word in re.findall(r"`([\w.]+)`", cells[1])]
    assert here
    if name == "GenerateParamsConfig":
        assert set(here) <= set(SamplingParams.DESCRIPTOR.fields_by_name)
    else:
        for key in here:
            section, _, field = key.rpartition(".")
            of: Any = TandemConfig.model_fields[section].annotation if section else TandemConfig
            assert field in of.model_fields, f"{key} is no setting"


def test_what_the_page_names_exists():
    files = set(re.findall(r"`([\w.-]+/[\w./-]+\.\w+)`", PAGE))
    assert len(files) > 15
    assert not [path for path in sorted(files) if not (ROOT / path).is_file()]
    imports = [
        (module, name.strip())
        for module, names in re.findall(r"`from (shared[\w.]*) import ([\w, ]+)`", PAGE)
        for name in names.split(",")
    ]
    assert imports
    assert not [f"{module}.{name}" for module, name in imports if not hasattr(import_module(module), name)]
    dotted = re.findall(r"`(shared(?:\.\w+)+)`", PAGE)
    assert not [name for name in dotted if find_spec(name) is None]


def test_names_of_modules_are_those_of_the_registry():
    [[_, state, how]] = [cells for cells in rows("### Registry") if cells[0].startswith("`ConfigBundle(")]
    assert state == "works"
    assert set(re.findall(r"`(\w+)`", how)) == set(registry._MODULES)
