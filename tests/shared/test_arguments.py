import json
import subprocess
import sys

import pytest

from shared.arguments import parse_arguments, parse_overrides
from shared.config import ConfigError


def test_overrides_nest_and_keep_json_types() -> None:
    assert parse_overrides(["a.b=8", "a.c=text", "d=null", "e.f.g=[1, 2]", "h=a=b"]) == {
        "a": {"b": 8, "c": "text"},
        "d": None,
        "e": {"f": {"g": [1, 2]}},
        "h": "a=b",
    }


@pytest.mark.parametrize("assignment", ["decode.port", "=8", ".port=8", "decode.=8", ""])
def test_an_assignment_without_key_or_value_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_overrides([assignment])


def test_a_value_is_no_section() -> None:
    with pytest.raises(ConfigError, match="decode"):
        parse_overrides(["decode=8", "decode.port=8"])


def test_flags_win_over_the_file(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "tandem.yaml"
    path.write_text("decode: {port: 1, max_running: 2}\n")
    arguments = parse_arguments("decode_worker", ["--config", str(path), "--set", "decode.port=3"])
    assert (arguments.config.decode.port, arguments.config.decode.max_running) == (3, 2)
    assert not arguments.die_with_parent


def test_workers_take_their_ranks_as_a_flag() -> None:
    arguments = parse_arguments("prefill_worker", ["--tp", "2", "--set", "decode.tp=3"])
    config = arguments.config
    assert (config.tp_of(config.prefill), config.tp_of(config.decode)) == (2, 3)
    with pytest.raises(SystemExit):
        parse_arguments("gateway", ["--tp", "2"])


def test_a_refused_configuration_names_its_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments("decode_worker", ["--set", "decode.ports=3"])
    assert exit_info.value.code == 2
    assert "decode.ports" in capsys.readouterr().err


def test_reading_arguments_loads_no_torch() -> None:
    code = "import json, sys, shared.arguments; print(json.dumps('torch' in sys.modules))"
    assert json.loads(subprocess.check_output([sys.executable, "-c", code])) is False
