"""What becomes of an encoder's hidden states: one vector for each text, as sentence-transformers' files say.

modules.json               which modules a text goes through: Transformer, Pooling and, where there is one, Normalize
1_Pooling/config.json      how one vector is made of many
sentence_bert_config.json  max_seq_length, in tokens

A folder without them gives the mean of all tokens, not normalized. Free of torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.model_files import ModelError, read_json

PoolingMode = Literal["mean", "cls"]
_MODES: dict[str, PoolingMode] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class Pooling:
    """mode: the mean over all tokens, or the first one's state. normalizes: to length 1. max_tokens: of a text."""

    mode: PoolingMode = "mean"
    normalizes: bool = False
    max_tokens: int | None = None

    @classmethod
    def load(cls, folder: Path) -> Pooling:
        """Raises ModelError naming the file and what in it is not supported."""
        mode: PoolingMode = "mean"
        normalizes = False
        for kind, path in _modules(folder / "modules.json"):
            if kind == "Pooling":
                mode = _mode(folder / path / "config.json")
            elif kind == "Normalize":
                normalizes = True
            elif kind != "Transformer":
                raise ModelError(f"modules.json: {kind} is not supported; Transformer, Pooling and Normalize are")
        limits = folder / "sentence_bert_config.json"
        found = read_json(limits).get("max_seq_length") if limits.is_file() else None
        return cls(mode, normalizes, found if isinstance(found, int) else None)


def _modules(path: Path) -> list[tuple[str, str]]:
    """The kind and the folder of each."""
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no list of modules with a type and a path each") from error


def _mode(path: Path) -> PoolingMode:
    config = read_json(path)
    chosen = [name for name, value in config.items() if name.startswith("pooling_mode") and value is True]
    if isinstance(named := config.get("pooling_mode"), str):
        chosen = [named]
    modes = {**_MODES, "mean": "mean", "cls": "cls"}
    if len(chosen) != 1 or chosen[0] not in modes:
        raise ModelError(f"{path}: {' and '.join(chosen) or 'no pooling mode'}: one of mean and cls is supported")
    return "mean" if modes[chosen[0]] == "mean" else "cls"
