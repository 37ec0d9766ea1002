"""Text to token ids and back, over the `tokenizers` package: the ids of Hugging Face's fast tokenizers, without torch.

tokenizer = Tokenizer.load(model_files.folder)
ids = tokenizer.encode("Hello")
text = tokenizer.decode(ids)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from shared.detokenizer import (
    Detokenizer,
    WindowDetokenizer,
    byte_of_fallback,
    bytes_of_byte_level,
    compile_decoder,
    flatten,
)

# fields of tokenizer_config.json that name a special token; chat templates read them under these names
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer with the special tokens that its tokenizer_config.json names.

    backend: what tokenizer.json holds. config: what tokenizer_config.json holds.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        config = config or {}
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = {name: _content(config[name]) for name in SPECIAL_TOKENS if config.get(name)}
        backend.add_special_tokens(
            [token for token in self.special_tokens.values() if backend.token_to_id(token) is not None]
        )
        if "add_bos_token" in config or "add_eos_token" in config:
            self._frame_with(bool(config.get("add_bos_token")), bool(config.get("add_eos_token")))
        self._decoder: dict[str, Any] | None = json.loads(backend.to_str())["decoder"]
        self._make_parts = compile_decoder(self._decoder)
        self._special_pieces = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        self._pieces: dict[int, str | None] = {}
        self._texts: dict[int, str] = {}
        self._byte_level = any(part["type"] == "ByteLevel" for part in flatten(self._decoder))
        self._space_marks = _space_marks(self._decoder)
        self.longest_token_bytes = max(len(piece.encode()) for piece in backend.get_vocab())

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model's folder, from tokenizer.json and tokenizer_config.json."""
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        return cls(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Releases the GIL while it works, so that a long text may be encoded in a thread."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text of ids; ids that the tokenizer does not know show nothing."""
        return self._backend.decode(list(token_ids), skip_special_tokens=not keep_special_tokens)

    def detokenizer(self) -> Detokenizer | WindowDetokenizer:
        """A decoder of one growing output, special tokens left out."""
        if self._make_parts is None:
            return WindowDetokenizer(self.decode)
        return Detokenizer(self._make_parts(), self._piece)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in the middle of a text; a special token's are its name's."""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level and piece not in self._special_pieces:
            return bytes_of_byte_level(piece)
        if (byte := byte_of_fallback(piece)) is not None:
            return bytes([byte])
        for mark in self._space_marks:
            piece = piece.replace(mark, " ")
        return piece.encode()

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; a part of a character reads as U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.token_bytes(token_id).decode(errors="replace")
        return text

    def _piece(self, token_id: int) -> str | None:
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._backend.id_to_token(token_id)
            self._pieces[token_id] = piece = None if piece in self._special_pieces else piece
            return piece

    def _frame_with(self, bos: bool, eos: bool) -> None:
        """tokenizer_config.json's word on which tokens frame a text wins over tokenizer.json's, as in transformers."""
        first = self.special_tokens.get("bos_token") if bos else None
        last = self.special_tokens.get("eos_token") if eos else None
        frame = [*([first] if first else []), "$A", *([last] if last else [])]
        ids = {token: self._backend.token_to_id(token) for token in (first, last) if token}
        self._backend.post_processor = TemplateProcessing(single=frame, special_tokens=list(ids.items()))


def _content(token: str | dict[str, Any]) -> str:
    """Older files write a token as an object."""
    return token if isinstance(token, str) else token["content"]


def _space_marks(decoder: dict[str, Any] | None) -> list[str]:
    marks = [part["replacement"] for part in flatten(decoder) if part["type"] == "Metaspace"]
    replaced = [part for part in flatten(decoder) if part["type"] == "Replace" and part["content"] == " "]
    return marks + [part["pattern"]["String"] for part in replaced if "String" in part["pattern"]]
