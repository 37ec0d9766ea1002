"""Token ids to text, one token at a time: what comes out, put together, is exactly the decoder's text of all ids.

    detokenizer = tokenizer.detokenizer()
    text = detokenizer.push(token_id)  # "" while a character is unfinished
    text += detokenizer.finish()

A decoder of the `tokenizers` package is a chain of parts, each of which turns a list of pieces into a list of pieces.
Here each part of the chain keeps the little that it must know of the past, so that a token costs the same however long
the text is, and nothing is taken back: a byte that may begin a character waits for the bytes that end it.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Part(Protocol):
    """One part of a decoder, fed piece by piece."""

    def push(self, pieces: list[str]) -> list[str]:
        """The pieces that are certain now."""
        ...

    def finish(self) -> list[str]:
        """What was held back, as it reads when nothing follows."""
        ...


class Detokenizer:
    """The text of a growing sequence of token ids.

    token: the decoder's piece of an id, None for an id that shows no text (a special or an unknown one).
    """

    def __init__(self, parts: Sequence[Part], token: Callable[[int], str | None]) -> None:
        self._parts = parts
        self._token = token

    def push(self, token_id: int) -> str:
        """The text that this token makes certain."""
        piece = self._token(token_id)
        if piece is None:
            return ""
        pieces = [piece]
        for part in self._parts:
            pieces = part.push(pieces)
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text; bytes that never became a character read as U+FFFD."""
        pieces: list[str] = []
        for part in self._parts:
            pieces = part.push(pieces) + part.finish()
        return "".join(pieces)


class WindowDetokenizer:
    """For decoders made of other parts: decodes a short window of tokens with and without the newest ones.

    Exact where a token's text does not depend on tokens beyond the window's edge.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_shown = 0  # tokens of the window whose text was given out

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        shown = self._decode(self._window[: self._num_shown])
        text = self._decode(self._window)
        if not final and (len(text) <= len(shown) or text.endswith("\ufffd")):
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text[len(shown) :]


def compile_decoder(decoder: dict[str, Any] | None) -> Callable[[], list[Part]] | None:
    """A maker of the parts of a decoder, given as in tokenizer.json; None if one of them is not known here."""
    if decoder is None:
        return lambda: [JoinWithSpaces()]
    makers: list[Callable[[], Part]] = []
    fused = False
    for part in flatten(decoder):
        kind = part["type"]
        if kind == "ByteLevel":
            makers.append(ByteLevel)
            fused = True
        elif kind == "ByteFallback":
            makers.append(ByteFallback)
        elif kind == "Fuse":
            fused = True  # the pieces are joined in the end anyway; what it changes is what Strip strips
        elif kind == "Replace" and isinstance(part["pattern"], dict) and "String" in part["pattern"]:
            old, new = part["pattern"]["String"], part["content"]
            makers.append(lambda old=old, new=new: Replace(old, new))
        elif kind == "Metaspace":
            mark, keeps_first = part["replacement"], part.get("prepend_scheme") == "never"
            makers.append(lambda mark=mark, keeps_first=keeps_first: Metaspace(mark, keeps_first))
        elif kind == "Strip" and not part["stop"]:
            content, start, whole = part["content"], part["start"], fused
            makers.append(lambda content=content, start=start, whole=whole: Strip(content, start, whole))
        else:
            return None
    return lambda: [make() for make in makers]


def flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a decoder, in order."""
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in flatten(inner)]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: every byte as a printable character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


BYTE_OF_CHARACTER = _byte_of_character()


def bytes_of_byte_level(piece: str) -> bytes:
    """The bytes that a piece of a byte-level vocabulary stands for; an added token may be plain text."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in piece])
    except KeyError:
        return piece.encode()


def byte_of_fallback(piece: str) -> int | None:
    """The byte that a piece such as `<0x0A>` stands for."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


class ByteLevel:
    """Characters that stand for bytes, the bytes read as UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, pieces: list[str]) -> list[str]:
        return [self._decoder.decode(bytes_of_byte_level(piece)) for piece in pieces]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


class ByteFallback:
    """A run of byte tokens becomes text if the whole run is UTF-8, else one U+FFFD a byte: so it waits for its end."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            byte = byte_of_fallback(piece)
            if byte is not None:
                self._run.append(byte)
            else:
                out += self.finish()
                out.append(piece)
        return out

    def finish(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class Replace:
    """One string for another in each piece."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def push(self, pieces: list[str]) -> list[str]:
        return [piece.replace(self._old, self._new) for piece in pieces]

    def finish(self) -> list[str]:
        return []


class Metaspace:
    """The mark becomes a space; in the first piece it is dropped unless the tokenizer never prepends it."""

    def __init__(self, mark: str, keeps_first: bool) -> None:
        self._mark = mark
        self._drop = not keeps_first

    def push(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            out.append(piece.replace(self._mark, "" if self._drop else " "))
            self._drop = False
        return out

    def finish(self) -> list[str]:
        return []


class Strip:
    """Up to `start` of a character are dropped from the front: of the whole text, or of each piece."""

    def __init__(self, content: str, start: int, whole: bool) -> None:
        self._content, self._start, self._whole = content, start, whole
        self._left = start

    def push(self, pieces: list[str]) -> list[str]:
        return [self._strip(piece) for piece in pieces]

    def _strip(self, piece: str) -> str:
        if not self._whole:
            self._left = self._start
        elif not self._left or not piece:
            return piece
        end = 0
        while end < len(piece) and self._left and piece[end] == self._content:
            end += 1
            self._left -= 1
        if end < len(piece):
            self._left = 0
        return piece[end:]

    def finish(self) -> list[str]:
        return []


class JoinWithSpaces:
    """What a tokenizer without a decoder does."""

    def __init__(self) -> None:
        self._first = True

    def push(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            out.append(piece if self._first else " " + piece)
            self._first = False
        return out

    def finish(self) -> list[str]:
        return []
