"""docs/models.md: a row for each family, true to what it computes, and the policy of the example."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from shared.models.architecture import Architecture
from shared.policies.policy import Policy
from shared.policies.table import POLICIES, architecture_of
from tests.tiny_models import KINDS, tiny_model

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/models.md").read_text()


def rows(head: str) -> dict[str, list[str]]:
    """The cells behind the first one of each row of the table whose head begins so."""
    _, found, rest = PAGE.partition(f"\n| {head} |")
    assert found, f"docs/models.md has no table of {head!r}"
    lines = rest.split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): others for first, *others in cells}


def test_every_family_has_its_row_and_no_row_is_invented() -> None:
    assert list(rows("family")) == sorted(POLICIES)


def architectures(family: str) -> list[Architecture]:
    kinds = [kind for kind, fields in KINDS.items() if fields["model_type"] == family]
    return [architecture_of(json.loads((tiny_model(kind) / "config.json").read_text())) for kind in kinds]


@pytest.mark.parametrize("family", sorted({str(fields["model_type"]) for fields in KINDS.values()}))
def test_a_row_says_what_the_family_computes(family: str) -> None:
    positions, attention, norm, mlp, notes = rows("family")[family]
    for a in architectures(family):
        kind = "learned" if a.num_positions else "ALiBi" if a.alibi_slopes else "rope"
        assert kind in positions
        assert norm.startswith("RMSNorm" if a.norm == "rms" else "LayerNorm")
        assert mlp.startswith("experts" if a.experts else "gated" if a.gated else "plain")
        assert ("one for all" in mlp) == bool(a.experts and a.experts.shared_size)
        assert "window" in attention or not any(a.sliding_window)
        assert "normalised" in attention or not a.qk_norm
        assert "capped" in attention or a.attention_cap is None
        assert "capped" in notes or a.logit_cap is None
        assert "beside" in notes or not a.parallel
        assert "1 + weight" in norm or not a.norm_offset
        assert "part of a head" in positions or not any(
            rope and rope.kind != "longrope" and rope.dim < a.head_dim for rope in a.ropes
        )
        assert "longrope" in notes or not any(rope and rope.kind == "longrope" for rope in a.ropes)


def test_the_policy_is_the_example_s_and_of_thirty_lines() -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code in (ROOT / "examples/custom_policy.py").read_text()
    assert len(code.splitlines()) <= 30


def test_every_field_of_a_policy_is_told() -> None:
    assert list(rows("field of `Policy`")) == [field.name for field in dataclasses.fields(Policy)]


def test_the_readme_points_here() -> None:
    assert "docs/models.md" in (ROOT / "README.md").read_text()
