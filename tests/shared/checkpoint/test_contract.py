"""What errors say of names and files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.checkpoint import CheckpointError, MappingCheckpoint, SafetensorsCheckpoint, check_names, place_of
from shared.checkpoint.metadata import MAX_BYTES, read_metadata


def test_names_that_do_not_fit() -> None:
    check_names({"a", "b", "rotary.3"}, {"a", "b"}, [r"rotary\.\d"])
    with pytest.raises(CheckpointError, match=r"1 missing \(b\); 1 not expected by this family \(c\)"):
        check_names({"a", "c"}, {"a", "b"})
    with pytest.raises(CheckpointError, match=r"6 missing \(0, 1, 2, 3, …\)"):
        check_names(set(), set("012345"))


def test_the_place_of_a_parameter(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    checkpoint = SafetensorsCheckpoint((tmp_path / "one.safetensors", tmp_path / "two.safetensors"))
    assert place_of(checkpoint, "two") == f" in {tmp_path}/two.safetensors"
    assert place_of(checkpoint, "two", "one") == f" in {tmp_path}/one.safetensors, {tmp_path}/two.safetensors"
    assert place_of(MappingCheckpoint({"one": torch.zeros(2)}), "one") == ""


@pytest.mark.parametrize(("text", "reason"), [("[1]", "not a JSON object"), ("{", "not JSON"), ("[" * 10**5, "JSON")])
def test_metadata_that_is_no_object(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        read_metadata(tmp_path / "x.json")


def test_metadata_is_bounded(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"x\.json has \d+ bytes"):
        read_metadata(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match=r"cannot read .*y\.json"):
        read_metadata(tmp_path / "y.json")
