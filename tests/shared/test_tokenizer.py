"""Text, ids and back: equal to the `tokenizers` package's full decode, token by token, and to transformers' ids."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.detokenizer import Detokenizer, WindowDetokenizer
from shared.tokenizer import Tokenizer
from tests import tiny_tokenizers

TEXTS = (
    "hello world",
    "  two spaces,  and a trailing one ",
    "北京是中国的首都，今天天气很好",
    "👩‍🔬🚀🇫🇷 e\u0301 naïve café",
    "\n\ttabs\r\nand lines\n\n",
    "<|end|> in the text, <note é> too",
    "",
)

KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": tiny_tokenizers.byte_level,
    "sentencepiece_like": tiny_tokenizers.sentencepiece_like,
    "metaspace_always": lambda: tiny_tokenizers.metaspace("always"),
    "metaspace_never": lambda: tiny_tokenizers.metaspace("never"),
    "undecorated": tiny_tokenizers.undecorated,
    "word_piece": tiny_tokenizers.word_piece,
}
BACKENDS = {name: Tokenizer(make()) for name, make in KINDS.items()}
EXACT = [name for name in KINDS if name != "word_piece"]
SIZES = {name: make().get_vocab_size() for name, make in KINDS.items()}


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_ids_add_up_to_the_full_decode(kind: str, data: st.DataObject) -> None:
    # some ids are beyond the vocabulary: models are padded, and a random one picks those rows too
    token_ids = data.draw(st.lists(st.integers(0, SIZES[kind] + 3), max_size=40))
    tokenizer = BACKENDS[kind]
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_comes_back_without_a_broken_character(kind: str, text: str) -> None:
    tokenizer = BACKENDS[kind]
    token_ids = tokenizer.encode(text)
    parts = pieces(tokenizer, token_ids)
    assert "".join(parts) == tokenizer.decode(token_ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
@pytest.mark.parametrize("text", TEXTS)
def test_texts(kind: str, text: str) -> None:
    tokenizer = BACKENDS[kind]
    assert "".join(pieces(tokenizer, tokenizer.encode(text))) == tokenizer.decode(tokenizer.encode(text))


def test_random_ids_of_a_real_vocabulary(default_model: Path) -> None:
    rng = random.Random(0)
    tokenizer = Tokenizer.load(default_model)
    for _ in range(200):
        token_ids = [rng.randrange(49_152) for _ in range(rng.randrange(60))]
        assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_a_character_waits_for_its_last_byte() -> None:
    tokenizer = BACKENDS["byte_level"]
    rocket = [tokenizer._backend.token_to_id(piece) for piece in "ðŁļĢ"]
    assert pieces(tokenizer, rocket) == ["", "", "", "🚀", ""]
    assert pieces(tokenizer, rocket[:3]) == ["", "", "", "\ufffd"]


def test_a_run_of_byte_tokens_reads_as_one() -> None:
    tokenizer = BACKENDS["sentencepiece_like"]
    rocket = [3 + byte for byte in "🚀".encode()]
    hello = tokenizer._backend.token_to_id("▁hello")
    assert pieces(tokenizer, [*rocket, hello]) == ["", "", "", "", "🚀 hello", ""]
    # the decoder gives the whole run up when any of it is no UTF-8
    assert "".join(pieces(tokenizer, [*rocket, 3 + 0xFF])) == "\ufffd" * 5


def test_a_token_costs_the_same_at_the_end_of_a_long_text() -> None:
    for kind in EXACT:
        detokenizer = BACKENDS[kind].detokenizer()
        assert isinstance(detokenizer, Detokenizer)
        times = []
        for _ in range(2):
            start = time.process_time()
            for i in range(20_000):
                detokenizer.push(5 + i % 2)
            times.append(time.process_time() - start)
        assert times[1] < 5 * times[0] + 0.05


def test_a_decoder_of_another_kind_is_followed_through_a_window() -> None:
    detokenizer = BACKENDS["word_piece"].detokenizer()
    assert isinstance(detokenizer, WindowDetokenizer)
    assert [detokenizer.push(token_id) for token_id in (1, 2, 4)] == ["play", "ing", " tree"]


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    tokenizer = BACKENDS["byte_level"]
    token_ids = tokenizer.encode("hello<|end|>")
    assert tokenizer.decode(token_ids) == "hello"
    assert tokenizer.decode(token_ids, keep_special_tokens=True) == "hello<|end|>"


def test_the_text_and_bytes_of_single_tokens() -> None:
    tokenizer = BACKENDS["byte_level"]
    hello, end = tokenizer.encode(" hello<|end|>")
    assert (tokenizer.token_text(hello), tokenizer.token_bytes(hello)) == (" hello", b" hello")
    assert tokenizer.token_text(end) == "<|end|>"
    first_byte = tokenizer._backend.token_to_id("ð")
    assert (tokenizer.token_text(first_byte), tokenizer.token_bytes(first_byte)) == ("\ufffd", b"\xf0")
    like = BACKENDS["sentencepiece_like"]
    assert like.token_text(like._backend.token_to_id("▁hello")) == " hello"
    assert like.token_bytes(3 + 0xF0) == b"\xf0"
    assert like.token_bytes(100_000) == b""


@pytest.mark.parametrize("text", TEXTS)
def test_the_default_models_ids_are_transformers(default_model: Path, text: str) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(default_model)
    tokenizer = Tokenizer.load(default_model)
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["hello"]),
        ({"add_bos_token": True}, ["<s>", "hello"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "hello", "</s>"]),
    ],
)
def test_the_frame_that_the_config_asks_for(tmp_path: Path, flags: dict[str, bool], expected: list[str]) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = tiny_tokenizers.byte_level()
    backend.add_tokens(["<s>", "</s>"])  # not special yet: the config makes them so
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, **flags}
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    token_ids = tokenizer.encode("hello")
    assert [tokenizer.token_text(token_id) for token_id in token_ids] == expected
    assert tokenizer.decode(token_ids) == "hello"
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", **flags
    )
    assert reference.encode("hello") == token_ids


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    backend = tiny_tokenizers.byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert Tokenizer(backend).encode("a b c d e") == BACKENDS["byte_level"].encode("a b c d e")


def test_torch_is_not_loaded() -> None:
    code = "import sys, shared.tokenizer, shared.chat_template; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
