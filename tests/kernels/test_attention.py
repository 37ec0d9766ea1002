"""Paged attention against its float64 reference, and the same bits for a row in whatever call it is part of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.attention import attention_workspace, paged_attention, paged_attention_reference
from kernels.cpu import library
from kernels.kv_format import GREATEST, KvFormat, KvPlanes, quantize_rows

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
FORMS = pytest.mark.parametrize("form", GREATEST)
BENT = pytest.mark.parametrize(
    ("slopes", "soft_cap", "window"),
    [(True, None, None), (True, None, 30), (False, 5.0, None), (False, 5.0, 30), (True, 5.0, 30)],
)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class Case:
    """A pool with every sequence's keys and values in it, and the queries of all its tokens."""

    queries: list[Tensor]  # per sequence [length, heads, head_dim]
    tables: list[list[int]]
    cache: KvPlanes
    window: int | None
    slopes: Tensor | None = None
    soft_cap: float | None = None

    def run(
        self, spans: list[tuple[int, int, int]], *, padding: int = 0, decode: bool = False, reference: bool = False
    ) -> Tensor:
        """One call over (sequence, first token, end token) spans, each with all before it in the cache.

        decode: says that none of them is longer than a token.
        """
        device = self.cache.keys.device
        queries = [self.queries[s][begin:end] for s, begin, end in spans]
        queries += [torch.zeros_like(self.queries[0][:1])] * padding
        contexts = [end for _, _, end in spans] + [1] * padding
        width = max(len(table) for table in self.tables)
        tables = [self.tables[s] + [0] * (width - len(self.tables[s])) for s, _, _ in spans] + [[0] * width] * padding
        q = torch.cat(queries)
        cu_seqlens = torch.tensor([0, *(len(part) for part in queries)]).cumsum(0)
        indices = (cu_seqlens, torch.tensor(contexts), torch.tensor(tables).view(-1, width))
        indices = tuple(tensor.to(device, torch.int32) for tensor in indices)
        scale = q.shape[2] ** -0.5
        scores = {"alibi_slopes": self.slopes, "soft_cap": self.soft_cap}
        if reference:
            wide = self.cache.widened()
            wide = KvPlanes(wide.keys.double(), wide.values.double())
            return paged_attention_reference(q.double(), wide, *indices, scale, self.window, **scores)
        out = torch.full((len(q), q.shape[1] * q.shape[2]), torch.nan, dtype=q.dtype, device=device)
        more = scores | {"max_query_len": 1 if decode else None, "out": out}
        if decode:  # poisoned, and longer than it has to be
            size = attention_workspace(len(contexts), q.shape[1], q.shape[2], width * self.cache.keys.shape[2])
            more["workspace"] = torch.full((size + 3,), torch.nan, device=device)
        assert paged_attention(q, self.cache, *indices, scale, self.window, **more) is out
        return out[: len(q) - padding]

    def whole(self, sequence: int = 0) -> Tensor:
        return self.run([(sequence, 0, len(self.queries[sequence]))])

    def step(self, *positions: int, sequence: int = 0) -> Tensor:
        """A decode step at each position, all of them in one call."""
        return self.run([(sequence, position, position + 1) for position in positions], decode=True)


@pytest.fixture(params=[pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)])
def in_triton(request: pytest.FixtureRequest) -> str:
    """The device for what Triton alone computes."""
    if request.param == "cpu":
        request.getfixturevalue("interpreter")
    return request.param


def make_case(
    lengths: list[int],
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    block_tokens: int = 16,
    device: str = "cpu",
    slopes: bool = False,
    soft_cap: float | None = None,
    form: str = "plain",
) -> Case:
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // block_tokens) for length in lengths]
    blocks = iter((torch.randperm(sum(counts), generator=generator) + 1).tolist())
    tables = [[next(blocks) for _ in range(count)] for count in counts]
    # [blocks, layers, k and v, kv_heads, block_tokens, head_dim]; what no sequence owns is poison
    pool = torch.full((sum(counts) + 1, 2, 2, kv_heads, block_tokens, head_dim), torch.nan, dtype=dtype)
    pool[0] = 0
    for length, table in zip(lengths, tables, strict=True):
        for plane in (pool[:, 1, 0], pool[:, 1, 1]):
            rows = torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype)
            for i, block in enumerate(table):
                part = rows[i * block_tokens : (i + 1) * block_tokens]
                plane[block, :, : len(part)] = part.transpose(0, 1)
    queries = [(2 * torch.randn(length, heads, head_dim, generator=generator)).to(dtype) for length in lengths]
    cache = KvPlanes(pool[:, 1, 0].to(device), pool[:, 1, 1].to(device))
    return Case(
        [tensor.to(device) for tensor in queries],
        tables,
        cache if form == "plain" else quantized(cache, form),
        window,
        torch.logspace(-1, -8, heads, base=2).to(device) if slopes else None,
        soft_cap,
    )


def quantized(cache: KvPlanes, form: str) -> KvPlanes:
    """In a pool of bytes. The elements of what is poison are anything, and its scales NaN."""
    blocks, kv_heads, block_tokens, head_dim = cache.keys.shape
    layout = KvFormat(form, 2, kv_heads, head_dim, block_tokens)
    pool = torch.full((blocks, layout.block_bytes), 0xFF, dtype=torch.uint8, device=cache.keys.device)
    planes = layout.planes(pool, 1)
    for rows, elements, scales in (
        (cache.keys, planes.keys, planes.key_scales),
        (cache.values, planes.values, planes.value_scales),
    ):
        assert scales is not None
        for to, made in zip((elements, scales), quantize_rows(rows.cpu().nan_to_num(), form), strict=True):
            to.copy_(made)
        scales.masked_fill_(rows.isnan().any(-1), torch.nan)
    return planes


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(2, 2, 64), (6, 2, 64), (8, 1, 80), (4, 2, 96), (2, 2, 8), (5, 1, 128), (4, 2, 256), (2, 1, 24)],
)
def test_prefill_and_decode_match_the_reference(
    on: str, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    case = make_case([1, 15, 16, 17, 35, 80], heads, kv_heads, head_dim, dtype, device=on)
    spans = [(0, 0, 1), (1, 14, 15), (2, 0, 16), (3, 16, 17), (4, 0, 35), (5, 70, 80)]
    out, expected = case.run(spans), case.run(spans, reference=True)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    spans = [(s, len(queries) - 1, len(queries)) for s, queries in enumerate(case.queries)]
    out, expected = case.run(spans, decode=True), case.run(spans, reference=True)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@DTYPES
def test_more_heads_than_a_tile_has_rows_share_a_kv_head(on: str, dtype: torch.dtype) -> None:
    case = make_case([5, 3], 71, 1, 64, dtype, device=on)
    spans = [(0, 0, 5), (1, 2, 3)]
    out, expected = case.run(spans), case.run(spans, reference=True)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(case.step(0, 4), case.whole()[[0, 4]])


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (4, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((8, 1), (9, 3)))]
)
def test_prompts_around_the_edges_of_tiles(on: str, heads: int, kv_heads: int) -> None:
    """Every token of every prompt: among all prompts, in its own alone, and decoded."""
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129]
    case = make_case(lengths, heads, kv_heads, 64, torch.bfloat16, device=on)
    spans = [(s, 0, length) for s, length in enumerate(lengths)]
    together = case.run(spans)
    torch.testing.assert_close(together.double(), case.run(spans, reference=True), atol=8e-3, rtol=8e-3)
    assert torch.equal(torch.cat([case.whole(s) for s in range(len(lengths))]), together)
    tokens = [(s, i, i + 1) for s, length in enumerate(lengths) for i in range(length)]
    chosen = [i for i, (s, p, _) in enumerate(tokens) if p in (0, 15, 16, 63, 64) or p + 1 == lengths[s]]
    assert torch.equal(case.run([tokens[i] for i in chosen], decode=True), together[chosen])


@pytest.mark.parametrize("window", [1, 7, 64, 100, 600])
@pytest.mark.parametrize("block_tokens", [1, 7, 16, 128])
def test_sliding_windows_and_block_sizes_match_the_reference(window: int, block_tokens: int) -> None:
    case = make_case([700, 65], window=window, block_tokens=block_tokens)
    spans = [(0, 400, 700), (1, 0, 65), (0, 699, 700)]
    torch.testing.assert_close(case.run(spans).double(), case.run(spans, reference=True), atol=2e-6, rtol=2e-6)


@DTYPES
@FORMS
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(6, 2, 64), (8, 1, 80), (2, 2, 8), (5, 1, 128), (2, 1, 24)]
)
def test_a_quantized_cache_matches_the_reference(
    on: str, heads: int, kv_heads: int, head_dim: int, form: str, dtype: torch.dtype
) -> None:
    case = make_case([1, 17, 80], heads, kv_heads, head_dim, dtype, device=on, form=form)
    spans = [(0, 0, 1), (1, 0, 17), (2, 70, 80)]
    out, expected = case.run(spans), case.run(spans, reference=True)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(case.run([(2, 79, 80), (1, 16, 17)], decode=True), out[[27, 17]])


@DTYPES
@FORMS
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "window"), [(9, 3, 64, None), (16, 2, 40, 70)])
def test_rows_of_a_quantized_cache_have_the_same_bits_in_any_call(
    heads: int, kv_heads: int, head_dim: int, window: int | None, form: str, dtype: torch.dtype
) -> None:
    lengths = [600, *torch.randint(1, 200, (20,), generator=torch.Generator().manual_seed(1)).tolist()]
    case = make_case(lengths, heads, kv_heads, head_dim, dtype, window, form=form)
    whole = case.whole()
    assert whole.isfinite().all()
    for chunk in (7, 64, 511):
        parts = [case.run([(0, i, min(i + chunk, 600))]) for i in range(0, 600, chunk)]
        assert torch.equal(torch.cat(parts), whole), chunk
    steps = [*range(20), 63, 64, 127, 300, 511, 512, 599]
    assert torch.equal(torch.cat([case.run([(0, i, i + 1)]) for i in steps]), whole[steps])
    ends = [(s, length - 1, length) for s, length in enumerate(lengths)]
    alone = torch.cat([case.run([end]) for end in ends])
    assert torch.equal(case.run(ends, padding=5), alone)
    assert torch.equal(case.run(ends[:3]), alone[:3])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(case.whole(), whole)
        assert torch.equal(case.run([(0, 599, 600)]), whole[599:])
    finally:
        torch.set_num_threads(before)


@FORMS
def test_rows_of_a_quantized_cache_have_the_same_bits_across_splits_on_cuda(in_triton: str, form: str) -> None:
    case = make_case([520], 2, 1, 64, torch.bfloat16, 100, device=in_triton, form=form)
    chunk = case.run([(0, 505, 520)])
    assert torch.equal(case.step(505, 511, 512, 519), chunk[[0, 6, 7, 14]])


def in_blocks_of(block_tokens: int, case: Case) -> Case:
    """The same keys and values of its one sequence."""
    count = -(-len(case.queries[0]) // block_tokens)
    table = list(range(count, 0, -1))

    def moved(plane: Tensor | None) -> Tensor | None:
        if plane is None:
            return None
        rows = torch.cat([plane[block] for block in case.tables[0]], 1)  # [kv_heads, tokens, ...]
        blocks = rows.new_zeros(count + 1, rows.shape[0], block_tokens, *rows.shape[2:])
        for block, part in zip(table, rows.split(block_tokens, 1), strict=True):
            blocks[block, :, : part.shape[1]] = part
        return blocks

    cache = case.cache
    moved_planes = map(moved, (cache.keys, cache.values, cache.key_scales, cache.value_scales))
    return replace(case, tables=[table], cache=KvPlanes(*moved_planes, cache.form))


@DTYPES
@pytest.mark.parametrize("form", ["plain", *GREATEST])
def test_the_size_of_blocks_leaves_the_bits_alone(on: str, form: str, dtype: torch.dtype) -> None:
    case = make_case([80], 2, 1, 64, dtype, device=on, form=form)
    cases = [case, *(in_blocks_of(block_tokens, case) for block_tokens in (1, 32, 128))]
    whole, *others = (case.run([(0, 75, 80)]) for case in cases)
    assert all(torch.equal(other, whole) for other in others)
    assert all(torch.equal(case.step(79), whole[-1:]) for case in cases)


@FORMS
def test_a_scale_that_is_no_number_reaches_no_row_before_it(on: str, form: str) -> None:
    case = make_case([40], heads=2, kv_heads=1, dtype=torch.bfloat16, device=on, form=form)
    assert case.cache.key_scales is not None
    case.cache.key_scales[case.tables[0][1], :, 4] = torch.nan  # position 20
    out = case.whole()
    assert out[:20].isfinite().all()
    assert out[20:].isnan().all()


def test_large_scores_neither_overflow_nor_vanish(on: str) -> None:
    case = make_case([140], 2, 1, device=on)
    case.queries[0] *= 100
    torch.testing.assert_close(case.whole().double(), case.run([(0, 0, 140)], reference=True), atol=2e-4, rtol=2e-4)


def test_a_nan_key_reaches_every_row_that_sees_it_and_no_other(on: str) -> None:
    case = make_case([40], heads=2, kv_heads=1, device=on)
    case.cache.keys[case.tables[0][1], :, 4] = torch.nan  # position 20
    out = case.whole()
    assert out[:20].isfinite().all()
    assert out[20:].isnan().all()
    steps = case.step(0, 19, 20, 39)
    assert steps[:2].isfinite().all()
    assert steps[2:].isnan().all()


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 3, 64), (9, 3, 64), (8, 1, 80), (16, 2, 40)])
@pytest.mark.parametrize("window", [None, 70])
def test_chunks_and_decode_steps_give_the_bits_of_the_whole_prefill(
    heads: int, kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    length = 600  # crosses a split at 512
    case = make_case([length], heads, kv_heads, head_dim, dtype, window)
    whole = case.whole()
    assert whole.isfinite().all()
    for chunk in (7, 16, 64, 511):
        parts = [case.run([(0, i, min(i + chunk, length))]) for i in range(0, length, chunk)]
        assert torch.equal(torch.cat(parts), whole), chunk
    steps = [*range(40), 63, 64, 127, 128, 300, 510, 511, 512, 513, 598, 599]
    assert torch.equal(torch.cat([case.run([(0, i, i + 1)]) for i in steps]), whole[steps])


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "longest", "window"),
    [(9, 3, 64, 200, None), (9, 3, 64, 700, 70), (60, 20, 24, 140, None), (16, 1, 40, 600, 300)],
)
def test_neighbours_and_padding_leave_the_bits_alone(
    heads: int, kv_heads: int, head_dim: int, longest: int, window: int | None, dtype: torch.dtype
) -> None:
    """Many single tokens take all their kv heads at once, which one alone does not."""
    lengths = torch.randint(1, longest, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    case = make_case(lengths, heads, kv_heads, head_dim, dtype, window)
    alone = [case.run([(s, length - 1, length)]) for s, length in enumerate(lengths)]
    for batch in (2, 3, 8, 17, 64):
        spans = [(s, lengths[s] - 1, lengths[s]) for s in range(batch)]
        assert torch.equal(case.run(spans), torch.cat(alone[:batch])), batch
        assert torch.equal(case.run(spans, padding=5), torch.cat(alone[:batch])), batch
    mixed = case.run([(0, 0, lengths[0]), (1, lengths[1] - 1, lengths[1]), (2, 0, lengths[2])], padding=1)
    assert torch.equal(mixed, torch.cat([case.whole(0), alone[1], case.whole(2)]))


@pytest.mark.parametrize(
    ("length", "dtype", "window"),
    [
        pytest.param(1040, torch.bfloat16, None, marks=pytest.mark.slow),
        pytest.param(600, torch.bfloat16, 1, marks=pytest.mark.slow),
        (520, torch.bfloat16, 100),
        (520, torch.float32, 50),
        pytest.param(600, torch.float32, None, marks=pytest.mark.slow),
    ],
)
def test_a_token_has_the_same_bits_in_prefill_chunk_and_decode_on_cuda(
    in_triton: str, length: int, dtype: torch.dtype, window: int | None
) -> None:
    """Across splits. With a window, some rows of a tile see nothing of a tile or split that others see."""
    case = make_case([length, 70], 2, 1, 64, dtype, window, device=in_triton)
    whole = case.whole()
    expected = case.run([(0, 0, length)], reference=True)
    torch.testing.assert_close(whole.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for begin, end in ((0, 5), (1, 66), (505, 515), (515, length)):
        among = case.run([(1, 0, 70), (0, begin, end), (1, 69, 70), (0, 3, 3)], padding=2)
        assert torch.equal(among[70 : 70 + end - begin], whole[begin:end]), (begin, end)
    steps = [0, 1, 64, 510, 511, 512, 513, length - 1]
    assert torch.equal(case.step(*steps), whole[steps])
    assert torch.equal(torch.cat([case.step(i) for i in steps[-2:]]), whole[steps[-2:]])
    assert torch.equal(case.run([(0, 512, 513), (1, 9, 9), (0, 511, 512)], decode=True, padding=1), whole[[512, 511]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [(4, 1, 64, torch.bfloat16), (2, 1, 128, torch.bfloat16), (2, 2, 256, torch.bfloat16), (1, 1, 80, torch.float32)],
)
@pytest.mark.parametrize("window", [None, 300])
def test_chunks_and_decode_steps_of_long_prompts_on_cuda(
    in_triton: str, heads: int, kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    lengths = [1000, 513, 1, 700]
    case = make_case(lengths, heads, kv_heads, head_dim, dtype, window, device=in_triton)
    whole = case.whole()
    expected = case.run([(0, 0, 1000)], reference=True)
    torch.testing.assert_close(whole.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for chunk in (100, 511):
        parts = [case.run([(0, i, min(i + chunk, 1000))]) for i in range(0, 1000, chunk)]
        assert torch.equal(torch.cat(parts), whole), chunk
    mixed = case.run([(1, 0, 513), (0, 0, 1000), (3, 699, 700), (2, 0, 1)])
    assert torch.equal(mixed[513:1513], whole)
    steps = list(range(0, 1000, 37))
    assert torch.equal(case.step(*steps), whole[steps])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode_has_the_bits_of_prefill_with_the_tiles_of_every_gpu(
    interpreter: None, monkeypatch: pytest.MonkeyPatch, capability: int, head_dim: int
) -> None:
    from kernels.cuda import attention

    monkeypatch.setattr(attention, "_capability", lambda _: capability)
    case = make_case([530], 2, 1, head_dim, torch.bfloat16)
    out, expected = case.run([(0, 500, 530)]), case.run([(0, 500, 530)], reference=True)
    torch.testing.assert_close(out.double(), expected, atol=8e-3, rtol=8e-3)
    assert torch.equal(case.step(511, 512), out[[11, 12]])


@DTYPES
@BENT
def test_alibi_and_soft_caps_match_the_reference(
    on: str, slopes: bool, soft_cap: float | None, window: int | None, dtype: torch.dtype
) -> None:
    case = make_case([90], 4, 2, 64, dtype, window, device=on, slopes=slopes, soft_cap=soft_cap)
    out, expected = case.run([(0, 60, 90)]), case.run([(0, 60, 90)], reference=True)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(case.step(60, 64, 89), out[[0, 4, 29]])


@DTYPES
@FORMS
@pytest.mark.parametrize(("slopes", "soft_cap"), [(True, None), (False, 5.0)])
def test_alibi_and_soft_caps_of_a_quantized_cache_match_the_reference(
    on: str, slopes: bool, soft_cap: float | None, form: str, dtype: torch.dtype
) -> None:
    case = make_case([50], 6, 2, 40, dtype, device=on, slopes=slopes, soft_cap=soft_cap, form=form)
    out, expected = case.run([(0, 40, 50)]), case.run([(0, 40, 50)], reference=True)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(case.step(49), out[9:])


@DTYPES
@pytest.mark.parametrize(
    ("slopes", "soft_cap", "window", "form"),
    [(True, None, None, "plain"), (False, 5.0, 30, "plain"), (True, 5.0, None, "plain"), (True, 5.0, 30, "int8")],
)
def test_rows_with_alibi_and_soft_caps_have_the_same_bits_in_any_call(
    slopes: bool, soft_cap: float | None, window: int | None, form: str, dtype: torch.dtype
) -> None:
    """No head has another's slope, neither in chunks, nor where many tokens take all kv heads at once."""
    lengths = [600, *range(1, 60, 5)]
    case = make_case(lengths, 9, 3, 40, dtype, window, slopes=slopes, soft_cap=soft_cap, form=form)
    whole = case.whole()
    expected = case.run([(0, 0, 600)], reference=True)
    torch.testing.assert_close(whole.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for chunk in (17, 511):
        parts = [case.run([(0, i, min(i + chunk, 600))]) for i in range(0, 600, chunk)]
        assert torch.equal(torch.cat(parts), whole), chunk
    ends = [(s, length - 1, length) for s, length in enumerate(lengths)]
    alone = torch.cat([case.run([end]) for end in ends])
    assert torch.equal(alone[:1], whole[599:])
    assert torch.equal(case.run(ends, padding=5), alone)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(case.whole(), whole)
        assert torch.equal(case.run(ends[:1]), whole[599:])
    finally:
        torch.set_num_threads(before)


def test_more_heads_than_a_tile_has_rows_have_slopes_of_their_own(on: str) -> None:
    case = make_case([5], 71, 1, 8, torch.bfloat16, device=on, slopes=True)
    expected = case.run([(0, 3, 5)], reference=True)
    torch.testing.assert_close(case.run([(0, 3, 5)]).double(), expected, atol=8e-3, rtol=8e-3)


def test_the_hyperbolic_tangent_is_within_two_ulp() -> None:
    edges = torch.tensor([0.0, 0.625, 0.62499994, 9.01, 44.0, 100.0, 1e30, torch.inf]).repeat(2)
    x = torch.cat([torch.linspace(0, 10, 160_000), torch.logspace(-30, 2, 16_000), edges])
    x = torch.cat([x, -x])
    y = torch.full_like(x, torch.nan)
    library.call("tandem_tanh", x.data_ptr(), y.data_ptr(), x.numel())
    exact = x.double().tanh()
    ulp = torch.finfo(torch.float32).eps * torch.exp2(exact.abs().clamp(min=1e-37).log2().floor())
    assert ((y.double() - exact).abs() / ulp).max() < 2
    nan = torch.full((16,), torch.nan)
    library.call("tandem_tanh", nan.data_ptr(), y.data_ptr(), 16)
    assert y[:16].isnan().all()


def test_a_soft_cap_bounds_large_scores_and_keeps_a_nan(on: str) -> None:
    case = make_case([40], 2, 1, device=on, soft_cap=30.0)
    case.queries[0] *= 1000
    torch.testing.assert_close(case.whole().double(), case.run([(0, 0, 40)], reference=True), atol=1e-4, rtol=1e-4)
    case.cache.keys[case.tables[0][1], :, 4] = torch.nan  # position 20
    assert case.whole()[:20].isfinite().all()
    assert case.whole()[20:].isnan().all()


def test_nothing_is_read_outside_of_what_is_seen(in_triton: str) -> None:
    """Neither table entries beyond the context nor, with a window, what lies before that of every row of a call."""
    case = make_case([300], 2, 1, 64, torch.bfloat16, 20, device=in_triton)
    steps, chunk = case.step(290), case.run([(0, 270, 291)])
    for block in case.tables[0][:15]:  # positions 0 .. 239: handed to somebody else
        case.cache.values[block] = torch.nan
    case.tables[0][:12] = [-(2**31)] * 12
    case.tables[0] += [2**31 - 1] * 3
    assert torch.equal(case.step(290), steps)
    assert torch.equal(case.run([(0, 270, 291)]), chunk)


@pytest.mark.parametrize("max_query_len", [None, 1])
def test_on_cuda_lengths_that_do_not_fit_leave_everything_else_alone(in_triton: str, max_query_len: int | None) -> None:
    """A sequence without a context gives 0, one with more than its table holds has what the table holds."""
    case = make_case([32], 2, 1, device=in_triton)
    q = torch.cat([case.queries[0][:1]] * 3)
    out = torch.full((4, 128), torch.nan, device=in_triton)

    def integers(*values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=in_triton)

    paged_attention(
        q, case.cache, integers(0, 1, 2, 2, 9), integers(0, 1000, 7, 8),
        integers(*[case.tables[0]] * 4), 0.125, max_query_len=max_query_len, out=out[:3],
    )  # fmt: skip
    assert (out[0] == 0).all()
    assert out[1].isfinite().all()
    assert out[3].isnan().all()


@pytest.mark.parametrize("window", [None, 900])
def test_the_number_of_threads_leaves_the_bits_alone(window: int | None) -> None:
    case = make_case([2500, 3], window=window)  # one sequence alone is shared out by splits
    spans = [[(0, 2499, 2500)], [(0, 2490, 2500), (1, 0, 3)], [(0, 100, 1200)]]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([case.run(span) for span in spans])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert torch.equal(results[0][1][9], results[0][0][0])


@pytest.mark.parametrize("decode", [False, True])
def test_empty_sequences_and_empty_batches(on: str, decode: bool) -> None:
    case = make_case([20, 30], device=on)
    assert torch.equal(case.run([(0, 5, 5), (1, 29, 30), (0, 0, 0)], decode=decode), case.whole(1)[29:])
    assert case.run([(0, 5, 5)], decode=decode).shape == (0, 9 * 64)


def test_broken_contracts_are_refused() -> None:
    case, few = make_case([40]), make_case([40], form="int8").cache
    q = case.queries[0]
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32)
    context = torch.tensor([40], dtype=torch.int32)
    table = torch.tensor([case.tables[0]], dtype=torch.int32)

    def run(**changes: object) -> Tensor:
        arguments = {
            "q": q, "cache": case.cache,
            "cu_seqlens": cu_seqlens, "context_lens": context, "block_tables": table, "scale": 0.125,
        }  # fmt: skip
        return paged_attention(**{**arguments, **changes})  # type: ignore[arg-type]

    run()
    for message, change in {
        "share float32, bfloat16 or float16": {"q": q.bfloat16()},
        "q must be contiguous": {"q": q.transpose(0, 1).contiguous().transpose(0, 1)},
        "multiple of 8": {"q": q[..., :12].contiguous()},
        "does not fit": {"q": q[:, :8].contiguous()},
        "cu_seqlens must be int32": {"cu_seqlens": cu_seqlens.long()},
        "wanted one more": {"context_lens": torch.ones(2, dtype=torch.int32)},
        "at least 1": {"sliding_window": 0},
        "out must be": {"out": torch.empty(3)},
        "runs on: cpu, cuda": {"q": q.to("meta")},
        "like q, got one on meta": {"context_lens": context.to("meta")},
        "do not make 40 query tokens": {"max_query_len": 39},
        "alibi_slopes must be": {"alibi_slopes": torch.ones(8)},
        "sliding_window needs causal attention": {"sliding_window": 7, "causal": False},
        "alibi_slopes needs causal attention": {"alibi_slopes": torch.ones(9), "causal": False},
        "soft_cap must be above 0": {"soft_cap": 0.0},
        "form 'int4' is none of plain, int8, fp8": {"cache": replace(case.cache, form="int4")},
        "keys and values of fp8 torch.int8, got torch.float32": {"cache": replace(case.cache, form="fp8")},
        "belong to int8 and fp8 alone, and form is plain": {"cache": replace(case.cache, key_scales=torch.ones(4))},
        "belong to int8 and fp8 alone, and form is int8": {"cache": replace(few, value_scales=None)},
        "value_scales must be float32": {"cache": replace(few, key_scales=torch.ones(4))},
    }.items():
        with pytest.raises(ValueError, match=message):
            run(**change)
    for message, change in {
        "do not fit its block table": {"context_lens": torch.tensor([49], dtype=torch.int32)},
        "sequence 0: 40 query tokens": {"context_lens": torch.tensor([39], dtype=torch.int32)},
        "names a block outside": {"block_tables": table + 1000},
        "cu_seqlens must go from 0": {"cu_seqlens": torch.tensor([0, 41], dtype=torch.int32)},
    }.items():
        with pytest.raises(IndexError, match=message):
            run(**change)


def test_broken_contracts_of_cuda_alone_are_refused(interpreter: None) -> None:
    case = make_case([5])
    with pytest.raises(ValueError, match="multiple of 8 up to 256"):
        make_case([5], 1, 1, 264).whole()
    arguments = (
        case.queries[0][4:], case.cache, torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([5], dtype=torch.int32), torch.tensor(case.tables, dtype=torch.int32), 0.125,
    )  # fmt: skip
    size = attention_workspace(1, 9, 64, 16)
    assert torch.equal(
        paged_attention(*arguments, max_query_len=1),
        paged_attention(*arguments, max_query_len=1, workspace=torch.empty(size)),
    )
    for workspace in (torch.empty(size - 1), torch.empty(size).double(), torch.empty(size, 2)[:, 0]):
        with pytest.raises(ValueError, match="workspace must be"):
            paged_attention(*arguments, max_query_len=1, workspace=workspace)
