"""Pooling as the files of sentence-transformers describe it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.model_files import ModelError
from shared.pooling import Pooling


def folder_with(folder: Path, pooling: dict[str, Any], *kinds: str, tokens: int | None = None) -> Path:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if tokens:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": tokens}))
    return folder


def test_a_folder_without_the_files_gives_the_mean(tmp_path: Path) -> None:
    assert Pooling.load(tmp_path) == Pooling("mean", normalizes=False, max_tokens=None)


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_mode_and_normalization_are_the_folders(tmp_path: Path, config: dict[str, Any], mode: str) -> None:
    folder_with(tmp_path, config, "Transformer", "Pooling", "Normalize", tokens=256)
    assert Pooling.load(tmp_path) == Pooling(mode, normalizes=True, max_tokens=256)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("config", "kinds", "named"),
    [
        ({"pooling_mode_max_tokens": True}, ("Transformer", "Pooling"), "pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ("Transformer", "Pooling"), "and"),
        ({}, ("Transformer", "Pooling"), "no pooling mode"),
        ({"pooling_mode": "mean"}, ("Transformer", "Pooling", "Dense"), "Dense"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, config: dict[str, Any], kinds: tuple[str, ...], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        Pooling.load(folder_with(tmp_path, config, *kinds))


def test_a_damaged_list_of_modules_is_named(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('{"a": 1}')
    with pytest.raises(ModelError, match=r"modules\.json"):
        Pooling.load(tmp_path)
