"""The sampler as a whole: Hugging Face's order, the same bits in any company, fair draws, rows at fault."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from kernels.sampling import draw
from shared import logprobs
from shared.logprobs import InvalidLogits
from shared.penalties import SampleRow, TokenHistory, edit_logits
from shared.sampling import Sampled, how_of, sample
from shared.sampling_params import SamplingParams

PLAIN = SamplingParams(max_tokens=1000, seed=1)
EOS = (2,)


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4


def mixed_rows(count: int, vocab_size: int) -> list[SampleRow]:
    """Rows that need every part of the sampler in every combination that chance makes."""
    chance = random.Random(5)
    rows = []
    for _ in range(count):
        params = SamplingParams(
            max_tokens=100,
            seed=chance.getrandbits(64),
            min_tokens=chance.choice([0, 50]),
            temperature=chance.choice([0, 0.3, 0.7, 1, 1.8]),
            top_p=chance.choice([1, 1, 0.5, 0.9, 0.99]),
            top_k=chance.choice([0, 0, 1, 5, 50, 700]),
            min_p=chance.choice([0, 0, 0.02, 0.3]),
            stop_token_ids=chance.choice([(), (4, 5)]),
            presence_penalty=chance.choice([0, 0, 0.6]),
            frequency_penalty=chance.choice([0, 0, -0.4]),
            repetition_penalty=chance.choice([1, 1, 1.2]),
            logit_bias=chance.choice([(), ((1, 4.0), (9, -2.5))]),
            logprobs=chance.choice([None, 0, 1, 5]),
        )
        tokens = [chance.randrange(vocab_size) for _ in range(chance.randrange(2, 120))]
        num_prompt = chance.randrange(1, len(tokens))
        rows.append(SampleRow.from_tokens(params, tokens, num_prompt, chance.randrange(4), EOS))
    return rows


@pytest.mark.parametrize("vocab_size", [1003, 49152])
def test_a_row_has_the_same_bits_alone_among_neighbours_and_with_any_threads(vocab_size):
    logits, rows = random_logits(64, vocab_size), mixed_rows(64, vocab_size)
    together = sample(logits, rows)
    assert [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(64)] == together
    order = random.Random(1).sample(range(64), 64)
    for size in (2, 7, 33):
        for start in range(0, 64, size):
            some = order[start : start + size]
            assert sample(logits[some], [rows[i] for i in some]) == [together[i] for i in some]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert sample(logits, rows) == together
            assert sample(logits[:1], rows[:1]) == together[:1]
    finally:
        torch.set_num_threads(threads)


def test_chunking_changes_no_bit(monkeypatch):
    logits, rows = random_logits(30, 1003), mixed_rows(30, 1003)
    whole = sample(logits, rows)
    for elements in (1, 4 * 1003, 10**9):
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", elements)
        assert sample(logits, rows) == whole


def test_a_strided_view_of_logits_gives_the_same_bits_and_is_not_written_to():
    padded = random_logits(12, 1030)
    before = padded.clone()
    rows = mixed_rows(12, 1003)
    assert sample(padded[:, 5:1008], rows) == sample(padded[:, 5:1008].contiguous(), rows)
    assert torch.equal(padded, before)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 199), min_size=1, max_size=30), st.data())
def test_a_recovered_history_continues_the_same_stream(tokens, data):
    """A sequence generated here, or resumed elsewhere from any point of it, draws the same tokens."""
    num_prompt = data.draw(st.integers(1, len(tokens)))
    tokens = tokens[:num_prompt]
    params = replace(PLAIN, temperature=0.9, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=2, top_p=0.95)
    grown = TokenHistory(tokens, num_prompt)
    for position in range(12):
        logits = random_logits(1, 200, seed=position)
        here = sample(logits, [SampleRow(params, position, history=grown)])
        assert sample(logits, [SampleRow.from_tokens(params, tokens, num_prompt)]) == here
        grown.append(here[0].token_id)
        tokens = [*tokens, here[0].token_id]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.4, "top_k": 20},
        {"temperature": 0.9, "top_p": 0.85},
        {"min_p": 0.1},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3, "min_tokens": 6},
        {"temperature": 1.2, "logit_bias": ((3, 2.5), (90, -4.0)), "top_p": 0.95, "repetition_penalty": 0.8},
    ],
    ids=str,
)
def test_every_step_of_hugging_face_generate_has_our_distribution_and_our_logprobs(settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config).eval()
    params = replace(PLAIN, **settings)
    prompt = [5, 17, 17, 60, 3]
    options = {
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p or None,
        "temperature": float(params.temperature),
        "repetition_penalty": float(params.repetition_penalty),
        "sequence_bias": {(i,): bias for i, bias in params.logit_bias} or None,
        "min_new_tokens": params.min_tokens or None,
    }
    made = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=True,
        max_new_tokens=10, eos_token_id=list(EOS), pad_token_id=0, output_scores=True, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    tokens = made.sequences[0].tolist()
    assert len(made.scores) >= max(1, params.min_tokens)
    for step, (scores, logits) in enumerate(zip(made.scores, made.logits, strict=True)):
        row = SampleRow.from_tokens(replace(params, logprobs=3), tokens[: len(prompt) + step], len(prompt), 0, EOS)
        probs = torch.empty_like(logits)
        draw(edit_logits(logits, [row]), how_of([row]), [0.0], kept=probs)
        assert torch.equal(probs > 0, scores.isfinite())
        torch.testing.assert_close(probs / probs.sum(), scores.softmax(dim=-1), rtol=1e-5, atol=1e-9)
        (drawn,) = sample(logits, [row])
        assert probs[0, drawn.token_id] > 0
        assert drawn.logprob == logits.log_softmax(dim=-1)[0, drawn.token_id].item()


def test_greedy_takes_the_lowest_id_of_equal_logits_and_follows_penalties():
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [1.0, 5.0, 5.0, 0.0], [1.0, 5.0, 4.0, 0.0]])
    greedy = replace(PLAIN, temperature=0, top_k=1, top_p=0.1, min_p=1.0)
    penalized = replace(greedy, presence_penalty=2)
    rows = [SampleRow(greedy, 0), SampleRow.from_tokens(penalized, [0, 1], 1), SampleRow(greedy, 9, index=3)]
    assert [row.token_id for row in sample(logits, rows)] == [1, 2, 1]


def test_logprobs_are_of_the_raw_logits_and_only_where_asked():
    logits = random_logits(3, 50)
    params = replace(PLAIN, temperature=0.2, logit_bias=((7, 100.0),), top_k=1)
    silent, zero, two = sample(logits, [SampleRow(replace(params, logprobs=k), 0) for k in (None, 0, 2)])
    raw = logits.log_softmax(dim=-1)
    assert silent == Sampled(7, None, ())
    assert zero == Sampled(7, raw[1, 7].item(), ())
    assert two.logprob == raw[2, 7].item()
    assert two.top == tuple(zip(raw[2].topk(2).indices.tolist(), raw[2].topk(2).values.tolist(), strict=True))


# The 99.9th percentile of chi-square with 15 degrees of freedom. Seeds are fixed, so the outcome never varies.
CHI_SQUARE_15 = 37.70
DRAWS = 10_000


@pytest.mark.parametrize("varied", ["seed", "index", "position"])
def test_draws_follow_the_probabilities(varied):
    logits = torch.linspace(-1.5, 1.5, 16)
    place = {"seed": 1234, "index": 0, "position": 0}
    rows = []
    for i in range(DRAWS):
        here = place | {varied: i}
        rows.append(SampleRow(replace(PLAIN, seed=here["seed"]), here["position"], here["index"]))
    picks = torch.tensor([one.token_id for one in sample(logits.expand(DRAWS, 16), rows)])
    expected = logits.double().softmax(dim=0) * DRAWS
    assert ((picks.bincount(minlength=16) - expected) ** 2 / expected).sum().item() < CHI_SQUARE_15


def test_successive_tokens_of_a_stream_are_independent():
    rows = [SampleRow(replace(PLAIN, seed=77), position) for position in range(DRAWS)]
    picks = torch.tensor([one.token_id for one in sample(torch.zeros(DRAWS, 4), rows)])
    pairs = (picks[:-1] * 4 + picks[1:]).bincount(minlength=16)
    expected = (DRAWS - 1) / 16
    assert ((pairs - expected) ** 2 / expected).sum().item() < CHI_SQUARE_15


def test_the_n_samples_of_a_request_differ_and_each_repeats():
    logits = random_logits(1, 500).expand(4, 500) / 8
    streams = [[], [], [], []]
    for position in range(20):
        rows = [SampleRow(PLAIN, position, index) for index in range(4)]
        for stream, one in zip(streams, sample(logits, rows), strict=True):
            stream.append(one.token_id)
    assert len(set(map(tuple, streams))) == 4
    again = [sample(logits[:1], [SampleRow(PLAIN, position, 2)])[0].token_id for position in range(20)]
    assert again == streams[2]


def test_removed_and_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 9), -torch.inf)
    logits[0, 3], logits[0, 8] = 0.0, -200.0  # exp(-200) is no float32
    rows = [SampleRow(replace(PLAIN, seed=seed, temperature=t), 0) for seed in range(200) for t in (1e-5, 1, 1.9)]
    assert {one.token_id for one in sample(logits.expand(len(rows), 9), rows)} == {3}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}], ids=str
)
def test_rows_without_a_distribution_are_named(temperature, filters):
    logits = random_logits(5, 40)
    logits[1, 7], logits[2], logits[4, 0] = torch.nan, -torch.inf, torch.inf
    rows = [SampleRow(replace(PLAIN, temperature=temperature, **filters), 0)] * 5
    with pytest.raises(InvalidLogits) as error:
        sample(logits, rows)
    assert error.value.rows == (1, 2, 4)
    assert len(sample(logits[[0, 3]], rows[:2])) == 2


def test_min_tokens_over_the_whole_vocabulary_leaves_nothing_to_draw():
    row = SampleRow(replace(PLAIN, min_tokens=1, stop_token_ids=tuple(range(10))), 0)
    with pytest.raises(InvalidLogits):
        sample(torch.zeros(1, 10), [row])


def test_extreme_but_valid_parameters_always_leave_a_distribution():
    extreme = [
        replace(
            PLAIN, temperature=t, repetition_penalty=r, presence_penalty=p, frequency_penalty=-p, logit_bias=((1, b),)
        )
        for t in (0, 1e-5, 1e6)
        for r in (1e-6, 1e6)
        for p in (-1e6, 1e6)
        for b in (-1e9, 1e9)
    ]
    assert all(params.validate(40) == [] for params in extreme)
    rows = [SampleRow.from_tokens(params, [1, 2, 1, 2, 2], 2) for params in extreme]
    assert len(sample(random_logits(len(rows), 40) * 25, rows)) == len(rows)


def test_no_rows_and_wrong_shapes():
    assert sample(torch.empty(0, 10), []) == []
    with pytest.raises(ValueError, match="2 rows need"):
        sample(torch.zeros(1, 10), [SampleRow(PLAIN, 0)] * 2)
    with pytest.raises(ValueError, match="float32"):
        sample(torch.zeros(1, 10, dtype=torch.bfloat16), [SampleRow(PLAIN, 0)])
