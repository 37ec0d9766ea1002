"""Tokenizers made on the fly: byte-level as GPT-2, Llama 3 and Qwen have, SentencePiece-like as Llama 2, and others."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (
    "the quick brown fox jumps over the lazy dog",
    "hello world, hello there; stop here and end",
    "naïve café — 北京是中国的首都 🚀 def f(x): return x",
)


def byte_level(size: int = 400) -> Tokenizer:
    """Every byte is a token, and common words are. `<|end|>` is special, `<note x>` an added token like any other."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("<note é>", normalized=False)])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Words that begin with ▁, bytes for what is unknown, a space put before the text and taken off again."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁▁▁"]
    pieces += ["▁hello", "▁world", "lo", "h", "e", "l", "o", "w", "r", "d", "n", "a", ",", ".", "中", "文", "é"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("l", "o")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def metaspace(prepend_scheme: str) -> Tokenizer:
    """The Metaspace decoder, which drops the first mark unless it is told that none was put there."""
    pieces = ["<unk>", "▁", "▁a", "▁▁b", "c", "▁d", "e▁f"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme)
    return tokenizer


def undecorated() -> Tokenizer:
    """Whole words and no decoder at all: they are joined with spaces."""
    words = ["<unk>", "one", "two", "three"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def word_piece() -> Tokenizer:
    """A decoder of another family, which is followed through a window of tokens."""
    pieces = ["[UNK]", "play", "##ing", "##ed", "tree", ",", "do", "n", "'", "t"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer
