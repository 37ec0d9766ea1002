"""`tandem doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from shared.doctor.host import examine

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def run(*, as_json: bool) -> int:
    """Prints what was found; the exit status is 1 if something keeps workers from starting."""
    findings = examine()
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for finding in findings:
            level = f"[{_STYLES[finding.level]}]{finding.level:8}[/]"
            console.print(f"{level}{finding.check}: {escape(finding.message)}")
            if finding.remedy:
                console.print(f"{'':8}{escape(finding.remedy)}")
    return int(any(finding.level == "error" for finding in findings))
