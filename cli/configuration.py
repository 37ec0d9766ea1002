"""`tandem config`: the effective configuration, each key with its meaning."""

from __future__ import annotations

import json
from typing import Any

import yaml
from pydantic import BaseModel

from shared.config import TandemConfig


def as_json(config: TandemConfig) -> str:
    """One JSON object; secrets are hidden."""
    return json.dumps(config.model_dump(mode="json"), indent=2)


def as_yaml(config: TandemConfig) -> str:
    """A tandem.yaml that sets every key to its effective value; secrets are hidden."""
    return "\n".join(_section(config, "")) + "\n"


def _section(section: BaseModel, indent: str) -> list[str]:
    lines: list[str] = []
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            lines += ["", f"{indent}{name}:", *_section(value, indent + "  ")]
        else:
            lines += [f"{indent}# {field.description}", f"{indent}{name}: {_flow(plain[name])}"]
    return lines


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
