"""The draw against Hugging Face, exact integers and its float64 reference; the generator against known answers.

On CUDA the draw is held to the CPU's, bit for bit: what those show of one they show of both.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kernels import device
from kernels.cpu import library
from kernels.sampling import (
    How,
    draw,
    draw_reference,
    draw_tokens,
    fill_uniforms,
    philox4x32_reference,
    token_uniforms,
    token_uniforms_reference,
)

TRITON = pytest.mark.parametrize(
    "on", ["triton, interpreted", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)


def random_logits(rows: int, vocab_size: int, scale: float, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def kept_of(logits: Tensor, *rows: How) -> Tensor:
    """What each row may draw, the most probable token being 1."""
    kept = torch.full(logits.shape, torch.nan, device=logits.device)
    draw(logits, rows, [0.0] * len(logits), kept=kept)
    return kept


def draw_in_c(logits: Tensor, how: list[How], uniforms: list[float]) -> tuple[list[int], Tensor]:
    """The tokens, and what was kept."""
    kept = torch.full(logits.shape, torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "INTERPRETED", False)
        return draw(logits.cpu(), how, uniforms, kept=kept), kept


def mixed(count: int) -> list[How]:
    chance = random.Random(5)
    return [
        How(
            chance.choice([0, 0.3, 0.7, 1, 1.8]),
            chance.choice([0, 0, 1, 5, 50, 700]),
            chance.choice([1, 1, 0.5, 0.9, 0.99]),
            chance.choice([0, 0, 0.02, 0.3]),
        )
        for _ in range(count)
    ]


def some_uniforms(count: int) -> list[float]:
    return token_uniforms(range(count), [0] * count, [0] * count)


# -- what the filters keep --------------------------------------------------------------------------------------------


def hugging_face(logits: Tensor, how: How) -> Tensor:
    """The processed scores, in the order in which `generate` builds its list."""
    temperature, top_k, top_p, min_p = how
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits)


FILTERS = pytest.mark.parametrize(
    "filters",
    [
        (0, 1, 0),
        (1, 1, 0),
        (40, 1, 0),
        (5000, 1, 0),
        (0, 0.9, 0),
        (0, 1e-6, 0),
        (0, 0.999, 0),
        (0, 1, 0.05),
        (0, 1, 1.0),
        (50, 0.8, 0),
        (7, 1, 0.2),
        (0, 0.95, 0.01),
        (100, 0.9, 0.02),
    ],
    ids=str,
)


@FILTERS
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 3.0), (0.6, 1.0), (1.9, 0.3), (1.0, 0.01)])
def test_keeps_what_hugging_face_keeps_with_its_probabilities(filters, temperature, scale):
    logits, how = random_logits(6, 3001, scale), How(temperature, *filters)
    expected = hugging_face(logits, how)
    kept = kept_of(logits, *[how] * 6)
    assert torch.equal(kept > 0, expected.isfinite())
    torch.testing.assert_close(kept / kept.sum(dim=-1, keepdim=True), expected.softmax(dim=-1), rtol=1e-5, atol=1e-9)


@FILTERS
def test_with_ties_as_many_of_each_score_stay_as_in_hugging_face(filters):
    # Which of equal scores stay at a top-p cut is left to an unstable sort there, so the scores are compared, not ids.
    logits, how = (random_logits(6, 700, 1.5) * 2).round() / 2, How(1.0, *filters)
    expected = hugging_face(logits, how)
    for scores, kept, wanted in zip(logits, kept_of(logits, *[how] * 6), expected, strict=True):
        assert torch.equal(scores[kept > 0].sort().values, wanted[wanted.isfinite()].sort().values)


def test_the_lowest_ids_stay_of_equal_scores_at_the_cut(on: str):
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]], device=on)
    assert kept_of(logits, How(1, 0, 1e-20, 0)).nonzero()[:, 1].tolist() == [1]  # what greedy takes
    assert kept_of(logits, How(1, 0, 0.5, 0)).nonzero()[:, 1].tolist() == [1, 3, 4]
    assert kept_of(logits, How(1, 2, 1, 0)).nonzero()[:, 1].tolist() == [1, 3, 4, 6]  # top-k keeps ties
    assert kept_of(torch.tensor([[-0.0, 0.0, -1.0]], device=on), How(1, 1, 1, 0)).nonzero()[:, 1].tolist() == [0, 1]


def test_a_mass_of_exactly_p_is_enough(on: str):
    logits = torch.zeros(1, 4, device=on)
    assert kept_of(logits, How(1, 0, 0.5, 0)).nonzero()[:, 1].tolist() == [0, 1]
    assert hugging_face(logits.cpu(), How(1, 0, 0.5, 0)).isfinite().sum() == 2


def exact(scores: list[float], e: list[float], how: How) -> set[int]:
    """The filters' definition, in integers without bound."""
    _, top_k, top_p, min_p = how
    kept = set(range(len(scores)))
    if 0 < top_k < len(scores):
        kth = sorted(scores, reverse=True)[top_k - 1]
        kept = {i for i in kept if scores[i] >= kth}
    if top_p < 1:
        weights = [int(x * 2 ** (52 - len(scores).bit_length())) for x in e]
        total = sum(weights[i] for i in kept)
        above, head = 0, set()
        for i in sorted(kept, key=lambda i: (-e[i], i)):
            if above < total - int((1 - top_p) * total) or not head:
                head.add(i)
            above += weights[i]
        kept = head
    if min_p > 0:
        kept = {i for i in kept if e[i] >= torch.tensor(min_p).item()}
    return kept


row_strategy = st.tuples(
    st.lists(st.integers(-60, 60).map(lambda x: x / 8), min_size=40, max_size=40),
    st.builds(
        How,
        st.just(1.0),
        st.sampled_from([0, 1, 2, 7, 30, 40, 90]),
        st.sampled_from([1e-12, 0.1, 0.5, 0.9, 0.999999, 1.0]) | st.floats(0.001, 1),
        st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    ),
)


@settings(deadline=None)
@given(st.lists(row_strategy, min_size=1, max_size=6))
def test_mixed_rows_equal_the_definition(rows):
    scores = torch.tensor([scores for scores, _ in rows])
    e = kept_of(scores, *[How(1.0)] * len(rows))  # no filter
    expected = [exact(scores[i].tolist(), e[i].tolist(), how) for i, (_, how) in enumerate(rows)]
    kept = kept_of(scores, *(how for _, how in rows))
    assert [set(row.nonzero().flatten().tolist()) for row in kept] == expected
    assert torch.equal(kept[kept > 0], e[kept > 0])


# -- which token is drawn ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 1023, 1025, 49_152])
@pytest.mark.parametrize("scale", [0.0, 0.01, 4.0])
def test_matches_the_reference(vocab_size, scale):
    logits, how, uniforms = random_logits(40, vocab_size, scale, seed=vocab_size), mixed(40), some_uniforms(40)
    assert draw(logits, how, uniforms) == draw_reference(logits, how, uniforms)


@pytest.mark.parametrize(("uniform", "token_id"), [(0.0, 1), (0.25 - 2**-53, 1), (0.25, 2), (1 - 2**-53, 5)])
def test_a_token_owns_the_uniforms_from_its_lower_edge_on(on: str, uniform, token_id):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0, -torch.inf, 0.0, -torch.inf]], device=on)
    assert draw(logits, [How(1)], [uniform]) == [token_id]


def test_temperature_0_takes_the_lowest_id_of_equal_ones(on: str):
    logits = torch.full((2, 10_000), -1.0, device=on)
    logits[0, [1000, 1000 + 4096, 999 + 8192]] = 0.0
    logits[1, [1001, 1000 + 4096]] = torch.tensor([-0.0, 0.0], device=on)
    assert draw(logits, [How(0)] * 2, [0.5] * 2) == [1000, 1001]


def test_the_last_uniform_takes_the_last_token_of_a_large_even_vocabulary():
    logits = torch.zeros(1, 2**18 - 1)
    for how in (How(1), How(1, top_p=0.5), How(1, top_k=5)):
        kept = kept_of(logits, how)
        assert draw(logits, [how], [1 - 2**-53])[0] == kept.nonzero()[-1, 1]


def test_a_row_has_the_same_token_alone_among_neighbours_and_with_any_threads():
    logits, how, uniforms = random_logits(33, 5003, 4.0), mixed(33), some_uniforms(33)
    together = draw(logits, how, uniforms)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert draw(logits, how, uniforms) == together
            alone = [draw(logits[i : i + 1], how[i : i + 1], uniforms[i : i + 1]) for i in range(33)]
            assert [token for tokens in alone for token in tokens] == together
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("how", [How(0), How(1), How(0.7, 3, 0.5, 0.1)], ids=str)
@pytest.mark.parametrize("vocab_size", [3, 16, 40, 49_152])
def test_rows_without_a_distribution_have_no_token(on: str, how, vocab_size):
    logits = random_logits(6, vocab_size, 4.0).to(on)
    logits[1, -1], logits[2], logits[3, 0], logits[5, 0] = torch.nan, -torch.inf, torch.inf, torch.nan
    tokens = draw(logits, [how] * 6, some_uniforms(6))
    assert [token < 0 for token in tokens] == [False, True, True, True, False, True]


def exotic_logits() -> Tensor:
    """[10, 200]: rows at which a search for a cut could go wrong."""
    width = 200
    powers = 10.0 ** torch.linspace(-38, 38, width)
    masked, zeros, biased, low = (
        torch.full((width,), -torch.inf),
        torch.zeros(width),
        torch.randn(width),
        torch.full((width,), -3e38),
    )
    masked[[3, 77]] = torch.tensor([1.0, 2.0])
    zeros[::2], zeros[5:20] = -0.0, -1
    biased[4], biased[9] = 1e9, -1e9
    low[7] = -2.9e38
    one_by_one = 1 + torch.arange(width) * 2**-23
    return torch.stack(
        [masked, zeros, biased, low, powers, -powers, one_by_one, -one_by_one, torch.ones(width), 1e38 * zeros]
    )


EXACT = pytest.mark.skipif(
    library.instruction_set() == "portable C", reason="without fused multiply-adds e differs in its last bits"
)


def assert_as_on_the_cpu(logits: Tensor, how: list[How], uniforms: list[float]) -> None:
    kept = torch.full(logits.shape, torch.nan, device=logits.device)
    tokens = draw(logits, how, uniforms, kept=kept)
    tokens_in_c, kept_in_c = draw_in_c(logits, how, uniforms)
    assert tokens == tokens_in_c
    drawn = [i for i, row in enumerate(how) if row.temperature and tokens[i] >= 0]
    assert torch.equal(kept.cpu()[drawn], kept_in_c[drawn])


@EXACT
@TRITON
@pytest.mark.parametrize(
    ("rows", "vocab_size"),
    [(4, 1), (8, 2), (12, 100), (12, 1000), (12, 4099)]
    + [pytest.param(24, vocab_size, marks=pytest.mark.slow) for vocab_size in (1, 1023, 4096, 49_152, 128_256)],
)
@pytest.mark.parametrize("step", [None, 0.5], ids=["", "ties"])
def test_cuda_draws_what_the_cpu_does(on: str, rows: int, vocab_size: int, step: float | None):
    logits = random_logits(rows, vocab_size, 4.0, seed=vocab_size).to(on)
    if step:
        logits = (logits / step).round() * step
    assert_as_on_the_cpu(logits, mixed(rows), some_uniforms(rows))


@EXACT
@TRITON
@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's: to infinity is what is meant
@pytest.mark.parametrize(
    ("temperature", "filters"),
    [(1.0, (5, 0.9, 0.1)), (1e-5, (0, 0.5, 0)), (1e6, (7, 0.9, 0.5))]
    + [
        pytest.param(temperature, filters, marks=pytest.mark.slow)
        for temperature in (1e-5, 1.0, 1e6)
        for filters in ((0, 1, 0), (1, 1, 0), (5, 1, 0), (0, 0.5, 0), (0, 1e-12, 0), (3, 0.999999, 1.0))
    ],
)
def test_cuda_draws_what_the_cpu_does_of_exotic_rows(on: str, temperature: float, filters: tuple[int, float, float]):
    logits = exotic_logits().to(on)
    how = [How(temperature, *filters)] * len(logits)
    assert_as_on_the_cpu(logits, how, some_uniforms(len(logits)))


@TRITON
@pytest.mark.parametrize("vocab_size", [2, 100, 1000, pytest.param(128_256, marks=pytest.mark.slow)])
def test_cuda_matches_the_reference(on: str, vocab_size: int):
    logits, how, uniforms = random_logits(8, vocab_size, 4.0, seed=vocab_size), mixed(8), some_uniforms(8)
    assert draw(logits.to(on), how, uniforms) == draw_reference(logits, how, uniforms)


@TRITON
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_are_drawn_with_their_own_uniforms(on: str, dtype: torch.dtype):
    rows, vocab_size = 10, 300
    logits = random_logits(rows, vocab_size + 4, 1.0).to(on)[:, :vocab_size]  # rows that are not next to each other
    logits[3, 5], logits[4] = torch.nan, -torch.inf
    how, chance = mixed(rows), random.Random(1)
    seeds, indices = [chance.getrandbits(64) for _ in range(rows)], list(range(rows))
    positions = [chance.randrange(100_000) for _ in range(rows)]
    tokens = torch.full((rows,), -7, device=on)
    made = draw_tokens(
        logits,
        torch.tensor(how, dtype=torch.float64, device=on),
        signed(seeds).to(on),
        torch.tensor(indices, dtype=dtype, device=on),
        torch.tensor(positions, dtype=dtype, device=on),
        tokens,
    )
    assert made is tokens
    assert tokens.tolist() == draw(logits, how, token_uniforms(seeds, indices, positions))
    assert tokens[3] == tokens[4] == -1


@TRITON
def test_a_row_has_the_same_token_alone_on_cuda(on: str):
    logits, how, uniforms = random_logits(6, 4500, 4.0).to(on), mixed(12)[6:], some_uniforms(6)
    together = draw(logits, how, uniforms)
    assert draw(logits[2:], how[2:], uniforms[2:]) == together[2:]
    assert [draw(logits[i : i + 1], how[i : i + 1], uniforms[i : i + 1])[0] for i in range(6)] == together


@TRITON
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
def test_values_out_of_range_make_no_token_beyond_the_vocabulary(on: str):
    how = [How(1.0, min_p=2.0), How(1.0), How(1.0), How(1.0, top_k=-3), How(1.0, top_p=-1.0)]
    uniforms = [0.5, 1.5, -0.5, 0.5, 0.5]
    for temperature in (-1.0, -1e-6, torch.inf, torch.nan):
        how += [How(temperature), How(temperature, 2, 0.5)]
        uniforms += [0.9, 0.9]
    tokens = draw(random_logits(len(how), 5, 9.0).to(on), how, uniforms)
    assert all(-1 <= token < 5 for token in tokens)


def test_broken_contracts_are_refused():
    logits, how, uniforms = torch.zeros(2, 5), [How(1)] * 2, some_uniforms(2)
    assert draw(logits[:0], [], []) == []
    with pytest.raises(ValueError, match="logits must be float32"):
        draw(logits.bfloat16(), how, uniforms)
    with pytest.raises(ValueError, match="logits must be float32"):
        draw(torch.zeros(5, 2).T, how, uniforms)
    with pytest.raises(ValueError, match="2 rows need as many of how and uniforms, got 1 and 2"):
        draw(logits, how[:1], uniforms)
    with pytest.raises(ValueError, match="got 2 and 1"):
        draw(logits, how, uniforms[:1])
    with pytest.raises(ValueError, match="kept must be"):
        draw(logits, how, uniforms, kept=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="runs on: cpu"):
        draw(logits.to("meta"), how, uniforms)


def test_broken_contracts_of_tensors_are_refused(interpreter: None):
    logits, settings, numbers = torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2).long()
    with pytest.raises(ValueError, match="settings must be"):
        draw_tokens(logits, settings.float(), numbers, numbers, numbers, numbers)
    with pytest.raises(ValueError, match="seeds must be contiguous"):
        draw_tokens(logits, settings, numbers[:1], numbers, numbers, numbers)
    with pytest.raises(ValueError, match=r"positions must be contiguous torch.int32 or torch.int64 \[2\]"):
        draw_tokens(logits, settings, numbers, numbers, logits[:, 0], numbers)
    with pytest.raises(ValueError, match="tokens must be"):
        draw_tokens(logits, settings, numbers, numbers, numbers, numbers.int())
    with pytest.raises(ValueError, match="out must be"):
        fill_uniforms(numbers, numbers, numbers, logits)
    with pytest.raises(ValueError, match="indices must be"):
        fill_uniforms(numbers, numbers[:1], numbers, torch.zeros(2, dtype=torch.float64))


def test_tensors_of_the_cpu_are_refused_without_triton():
    numbers = torch.zeros(2).long()
    with pytest.raises(ValueError, match="draw_tokens runs on: cuda"):
        draw_tokens(torch.zeros(2, 5), torch.zeros(2, 4).double(), numbers, numbers, numbers, numbers)
    with pytest.raises(ValueError, match="fill_uniforms runs on: cuda"):
        fill_uniforms(numbers, numbers, numbers, torch.zeros(2).double())


# -- the generator ----------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_the_reference_has_the_known_answers(counter, key, output):
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, output)]
    assert philox4x32_reference(words[0], words[1]) == words[2]


words32 = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), words32, words32)))
def test_uniforms_are_those_of_the_reference(rows):
    expected = [token_uniforms_reference(*row) for row in rows]
    assert all(0 <= uniform < 1 for uniform in expected)
    assert token_uniforms([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]) == expected


def signed(numbers: list[int]) -> Tensor:
    """int64 of the same 64 bits."""
    return torch.tensor([number - (number >> 63 << 64) for number in numbers], dtype=torch.int64)


@TRITON
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_uniforms_are_those_of_the_reference_on_cuda(on: str, dtype: torch.dtype):
    chance = random.Random(2)
    rows = [(chance.getrandbits(64), chance.getrandbits(31), chance.getrandbits(31)) for _ in range(300)]
    rows += [(0, 0, 0), (2**64 - 1, 2**31 - 1, 2**31 - 1), (1 << 63, 0, 1)]
    seeds, indices, positions = (list(column) for column in zip(*rows, strict=True))
    out = torch.full((len(rows),), torch.nan, dtype=torch.float64, device=on)
    counters = [torch.tensor(numbers, dtype=dtype, device=on) for numbers in (indices, positions)]
    assert fill_uniforms(signed(seeds).to(on), *counters, out) is out
    assert out.tolist() == [token_uniforms_reference(*row) for row in rows]


def test_uniforms_need_as_many_of_each():
    with pytest.raises(ValueError, match="2 seeds, 1 indices"):
        token_uniforms([1, 2], [0], [0, 0])
