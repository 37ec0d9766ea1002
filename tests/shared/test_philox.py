"""The generator against its published vectors and against plain integers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.philox import philox4x32, token_uniforms

# Random123 1.14.0, tests/kat_vectors, rows "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
words32 = st.integers(0, 2**32 - 1)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_known_answers_as_one_batch():
    counter = torch.tensor([words(counter) for counter, _, _ in KNOWN_ANSWERS])
    key = torch.tensor([words(key) for _, key, _ in KNOWN_ANSWERS])
    assert philox4x32(counter, key).tolist() == [words(output) for _, _, output in KNOWN_ANSWERS]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(words32, min_size=4, max_size=4), st.lists(words32, min_size=2, max_size=2)), min_size=1
    )
)
def test_equals_plain_integers(inputs):
    counter = torch.tensor([counter for counter, _ in inputs])
    key = torch.tensor([key for _, key in inputs])
    assert philox4x32(counter, key).tolist() == [reference(*one) for one in inputs]


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), words32, words32)
def test_uniform_is_the_first_53_bits_of_the_documented_counter(seed, index, position):
    word0, word1, _, _ = reference([position, index, 0, 0], [seed % 2**32, seed // 2**32])
    expected = ((word0 >> 5) * 2**26 + (word1 >> 6)) / 2**53
    assert 0 <= expected < 1
    assert token_uniforms([seed], [index], [position]).tolist() == [expected]


def test_a_seed_of_all_ones_and_no_rows():
    assert token_uniforms([2**64 - 1], [0], [0]).shape == (1,)
    assert token_uniforms([], [], []).shape == (0,)
