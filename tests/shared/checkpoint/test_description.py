"""DeepSpeed's descriptions: what each key does, and every refusal."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shared.checkpoint import Checkpoint, CheckpointError, Cut, Sizes, UnsupportedCheckpointError, open_any
from shared.checkpoint.description import parse_description

A, B, C = torch.arange(6.0).reshape(2, 3), torch.ones(4), torch.zeros(2, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of a model, in two formats."""
    save_file({"a": A}, tmp_path / "1.safetensors")
    torch.save({"b": B}, tmp_path / "2.bin")
    (tmp_path / "sub").mkdir()
    save_file({"c": C}, tmp_path / "sub" / "3.safetensors")
    return tmp_path


def listed(*files: str, **keys: object) -> dict[str, object]:
    return {"type": "ds_model", "checkpoints": list(files), "version": 1.0, **keys}


def assert_holds(checkpoint: Checkpoint, names: str) -> None:
    assert checkpoint.names() == set(names)
    for name in names:
        assert torch.equal(checkpoint.tensor(name), {"a": A, "b": B, "c": C}[name])


def test_a_list_is_one_model(folder: Path) -> None:
    every = listed("1.safetensors", "2.bin", "sub/3.safetensors")
    path = folder / "any_name.json"
    path.write_text(json.dumps(every))
    assert_holds(open_any(path, allow_pickle=True), "abc")
    assert_holds(open_any(str(path), allow_pickle=True), "abc")
    assert_holds(open_any({**every, "type": "BLOOM", "base_dir": str(folder)}, allow_pickle=True), "abc")
    assert_holds(
        open_any({**every, "parallelization": "pp", "dtype": "half"}, base_dir=str(folder), allow_pickle=True), "abc"
    )
    before = json.dumps(every)
    assert_holds(open_any(every, base_dir=str(folder), allow_pickle=True), "abc")
    assert json.dumps(every) == before, "the caller's dictionary is not touched"


def test_base_dir_is_joined(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "x.json"
    for base_dir, source in (("sub", path), (str(folder / "sub"), path), ("./sub/", path)):
        path.write_text(json.dumps(listed("3.safetensors", base_dir=base_dir)))
        assert_holds(open_any(source), "c")
    path.write_text(json.dumps(listed("3.safetensors")))
    assert_holds(open_any(path, base_dir=str(folder / "sub")), "c")
    path.write_text(json.dumps(listed("3.safetensors", base_dir="sub")))
    assert_holds(open_any(path, base_dir="/nowhere"), "c")
    # DeepSpeed writes the folder as it was said where it ran
    monkeypatch.chdir(folder.parent)
    (folder / "sub" / "x.json").write_text(json.dumps(listed("3.safetensors", base_dir=f"{folder.name}/sub")))
    assert_holds(open_any(folder / "sub" / "x.json"), "c")
    assert_holds(open_any(listed(f"{folder.name}/1.safetensors")), "a")
    with pytest.raises(CheckpointError, match="base_dir nowhere is no folder"):
        open_any(listed("1.safetensors", base_dir="nowhere"))


@pytest.mark.parametrize("name", ["../1.safetensors", "x/../../1.safetensors", "/etc/passwd", "..", "."])
def test_no_path_leaves_its_folder(name: str, folder: Path) -> None:
    path = folder / "sub" / "x.json"
    path.write_text(json.dumps(listed(name, base_dir=".")))
    with pytest.raises(CheckpointError, match=r"leaves .*sub, where all files|there is no .*sub"):
        open_any(path)
    if name.startswith("."):
        with pytest.raises(CheckpointError, match=r"leaves .*sub, where all files|there is no .*sub"):
            open_any(listed(name), base_dir=str(folder / "sub"))


def test_absolute_paths(folder: Path) -> None:
    inside = str(folder / "1.safetensors")
    assert_holds(open_any(listed(inside)), "a")
    assert_holds(open_any(listed(inside, base_dir=str(folder))), "a")
    with pytest.raises(CheckpointError, match="leaves"):
        open_any(listed(inside, base_dir=str(folder / "sub")))


@pytest.mark.parametrize("missing", ["type", "checkpoints", "version"])
def test_required_keys(missing: str) -> None:
    description = listed("1.safetensors")
    del description[missing]
    with pytest.raises(CheckpointError, match=f"lacks '{missing}'; type, checkpoints, version are needed"):
        open_any(description)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"type": "megatron"}, "megatron checkpoint type is not supported"),
        ({"type": "T5"}, "T5 checkpoint type is not supported"),
        ({"type": None}, "None checkpoint type is not supported"),
        ({"version": "1.0"}, "checkpoint version: 1.0 is not supported"),
        ({"checkpoints": []}, "checkpoints names no file"),
        ({"checkpoints": "1.safetensors"}, "checkpoints must be a list of file names"),
        ({"checkpoints": [3]}, "checkpoints must be a list of file names"),
        ({"checkpoints": [""]}, "checkpoints must be a list of file names"),
        ({"checkpoints": ["4.safetensors"]}, r"names 4\.safetensors, but there is no .*4\.safetensors"),
        ({"checkpoints": {"non_tp": ["1.safetensors"]}}, "must be a list of files"),
        ({"checkpoints": {"tp": ["1.safetensors"], "dp": []}}, "must be a list of files"),
        ({"checkpoints": {"tp": ["1.safetensors"], "non_tp": 1}}, "non_tp must be a list"),
        ({"checkpoints": {"tp": []}}, "names no file"),
        ({"type": "Megatron", "checkpoints": {"tp": ["1.safetensors"]}}, r"\(not Megatron\)"),
        ({"parallelization": "dp"}, "parallelization must be pp or tp, got 'dp'"),
        ({"parallelization": 1}, "parallelization must be a string, got 1"),
        ({"parallelization": "tp", "tp_size": 2}, "1 files are not those of tp_size 2"),
        ({"tp_size": 0}, "tp_size must be at least 1, got 0"),
        ({"mp_size": "2"}, "mp_size must be at least 1, got '2'"),
        ({"tp_size": 1, "mp_size": 2}, "tp_size and mp_size are the same thing: 1 and 2 differ"),
        ({"type": "Megatron", "tp_size": 2}, "1 files are not those of tp_size 2"),
        ({"dtype": "int4"}, "dtype must be one of float32, float16, bfloat16, int8, got 'int4'"),
        ({"base_dir": 3}, "base_dir must be a string"),
        ({"basedir": ""}, "has 'basedir'"),
        ({"sizes": 3}, "sizes must be an object"),
        ({"sizes": {"heads": 3}}, "sizes must be an object of num_heads"),
        ({"sizes": {"num_heads": 0}}, "sizes: num_heads must be at least 1"),
        ({"cuts": []}, "cuts must be an object"),
        ({"cuts": {"a": 0}}, "a is cut by 0, which is no cut"),
        ({"cuts": {"a": {"dim": 2}}}, "a is cut by"),
        ({"cuts": {"a": {"dim": True}}}, "a is cut by"),
        ({"cuts": {"a": {"dim": 0, "parts": []}}}, "a is cut by"),
        ({"cuts": {"a": {"dim": 0, "parts": ["heads"]}}}, "a is cut by"),
        ({"cuts": {"a": {"dim": 0, "parts": ["vocabulary", "q"]}}}, "a is cut by"),
    ],
)
def test_refusals(keys: dict[str, object], reason: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_any(listed("1.safetensors", **keys), base_dir=str(folder) if "base_dir" not in keys else "")


def test_deepspeeds_exception_types(folder: Path) -> None:
    with pytest.raises(AssertionError, match="T5 checkpoint type is not supported"):
        open_any({**listed(), "type": "T5"})
    assert issubclass(UnsupportedCheckpointError, CheckpointError)


def test_what_a_description_says(folder: Path) -> None:
    cuts = {"a": {"dim": 0, "parts": ["q", "kv"]}, "b": {"dim": None}}
    sizes = {"num_heads": 8, "num_kv_heads": 2}
    said = parse_description(listed("1.safetensors", dtype="torch.bfloat16", cuts=cuts, sizes=sizes), folder)
    assert said.dtype == "bfloat16"
    assert said.whole == (folder / "1.safetensors",)
    assert said.tp == ()
    assert said.sizes == Sizes(8, 2)
    assert said.table is not None
    assert said.table.of("a") == Cut(0, ("q", "kv"))
    assert said.table.of("b") == Cut(None)
    assert said.table.of("c") is None


def test_shards_are_listed_part_by_part(folder: Path) -> None:
    names = [f"tp_{rank:02d}_{part:02d}.pt" for part in range(2) for rank in range(3)]
    for name in names:
        (folder / name).touch()
    said = parse_description(listed(checkpoints={"tp": names, "non_tp": ["2.bin"]}, mp_size=3), folder)
    assert [[path.name for path in rank] for rank in said.tp] == [
        ["tp_00_00.pt", "tp_00_01.pt"],
        ["tp_01_00.pt", "tp_01_01.pt"],
        ["tp_02_00.pt", "tp_02_01.pt"],
    ]
    assert said.whole == (folder / "2.bin",)
    flat = parse_description(listed(*names, parallelization="tp"), folder)
    assert [len(rank) for rank in flat.tp] == [1] * 6


WORDS = st.sampled_from(["", "tp", "Megatron", "1.safetensors"])
INNER_KEYS = st.sampled_from(["tp", "non_tp", "dim", "parts", "a"])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(INNER_KEYS, inner, max_size=2),
    max_leaves=6,
)
KEYS = st.sampled_from(["type", "checkpoints", "version", "tp_size", "mp_size", "base_dir", "dtype", "cuts", "sizes"])


def outcome(data: dict[str, object], folder: Path) -> str:
    try:
        return type(parse_description(data, folder)).__name__
    except CheckpointError as error:
        return str(error)


@settings(max_examples=150, deadline=None)
@given(keys=st.dictionaries(KEYS, ANY, min_size=1, max_size=4))
def test_any_description_is_read_or_refused_in_words(keys: dict[str, object]) -> None:
    assert outcome(listed("1.safetensors") | keys, Path("/nowhere"))
