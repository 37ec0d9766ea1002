"""`tandem doctor`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from shared.arguments import parse_overrides
from shared.config import load_config
from shared.doctor.examination import examine
from shared.doctor.surroundings import Surroundings

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
_SHOWN = ("check", "level", "message", "remedy")


def run(config: Path | None, settings: Sequence[str], *, ask_cluster: bool | None, as_json: bool) -> int:
    """Prints what was found; the exit status is 1 if something keeps Tandem from serving, warnings alone leave it 0."""
    surroundings = Surroundings(load_config(config, parse_overrides(settings)))
    groups = examine(surroundings, ask_cluster=ask_cluster)
    findings = [finding for group in groups.values() for finding in group]
    if as_json:
        shown = [{name: getattr(finding, name) for name in _SHOWN} for finding in findings]
        print(json.dumps({"findings": shown}, indent=2))
        return int(any(finding.level == "error" for finding in findings))
    console = Console(highlight=False, soft_wrap=True)
    for group, found in groups.items():
        if found:
            console.print(f"[bold]{group}[/]")
        for finding in found:
            level = f"[{_STYLES[finding.level]}]{finding.level:8}[/]"
            console.print(f"  {level}{finding.check}: {escape(finding.message)}")
            if finding.remedy:
                console.print(textwrap.indent(escape(finding.remedy), " " * 10))
    return int(any(finding.level == "error" for finding in findings))
