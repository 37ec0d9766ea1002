"""Limits of each sampling parameter, and which token ends a sequence. The module must not load torch."""

import math
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from shared.sampling_params import SamplingParams, draw_seed, finish_reason

GOOD = SamplingParams(max_tokens=16, seed=0)
VOCAB = 100


def test_the_defaults_and_the_edges_of_every_range_are_accepted():
    assert GOOD.validate(VOCAB) == []
    low = replace(
        GOOD, max_tokens=1, temperature=0, top_p=1e-9, min_p=0, n=1, presence_penalty=-2, frequency_penalty=-2,
        repetition_penalty=1e-6, logprobs=0, prompt_logprobs=0, stop=("x",), stop_token_ids=(0,),
        logit_bias=((0, -1e9),),
    )  # fmt: skip
    high = replace(
        GOOD, min_tokens=16, temperature=1e6, top_k=10**9, min_p=1, n=128, seed=2**64 - 1, presence_penalty=2,
        frequency_penalty=2, repetition_penalty=1e6, logprobs=64, prompt_logprobs=64, stop=("x" * 1024,) * 64,
        stop_token_ids=tuple(range(VOCAB)), logit_bias=tuple((i, 1e9) for i in range(VOCAB)),
    )  # fmt: skip
    assert low.validate(VOCAB) == []
    assert high.validate(VOCAB) == []


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("max_tokens", 0, "max_tokens"),
        ("min_tokens", -1, "min_tokens"),
        ("min_tokens", 17, "min_tokens"),
        ("temperature", -0.1, "temperature"),
        ("temperature", 1e-6, "temperature"),
        ("temperature", math.nan, "temperature"),
        ("temperature", math.inf, "temperature"),
        ("top_p", 0.0, "top_p"),
        ("top_p", 1.1, "top_p"),
        ("top_p", math.nan, "top_p"),
        ("top_k", -1, "top_k"),
        ("min_p", -0.1, "min_p"),
        ("min_p", 1.1, "min_p"),
        ("seed", -1, "seed"),
        ("seed", 2**64, "seed"),
        ("n", 0, "n"),
        ("n", 129, "n"),
        ("presence_penalty", math.nan, "presence_penalty"),
        ("frequency_penalty", math.inf, "frequency_penalty"),
        ("repetition_penalty", 0.0, "repetition_penalty"),
        ("repetition_penalty", -1.0, "repetition_penalty"),
        ("logprobs", -1, "logprobs"),
        ("logprobs", 65, "logprobs"),
        ("prompt_logprobs", 65, "prompt_logprobs"),
        ("stop", ("a", ""), "stop[1]"),
        ("stop", ("a" * 1025,), "stop[0]"),
        ("stop", ("a",) * 65, "stop"),
        ("stop_token_ids", (VOCAB,), "stop_token_ids[0]"),
        ("stop_token_ids", (1, -1), "stop_token_ids[1]"),
        ("stop_token_ids", (1,) * 1025, "stop_token_ids"),
        ("logit_bias", ((VOCAB, 1.0),), f"logit_bias[{VOCAB}]"),
        ("logit_bias", ((3, math.nan),), "logit_bias[3]"),
        ("logit_bias", ((3, -math.inf),), "logit_bias[3]"),
        ("logit_bias", ((3, 1.0), (3, 2.0)), "logit_bias"),
        ("logit_bias", tuple((i, 1.0) for i in range(1025)), "logit_bias"),
    ],
)
def test_a_value_out_of_range_names_its_field(field, value, named):
    vocab_size = 2000 if named in ("logit_bias", "stop_token_ids") else VOCAB
    violations = replace(GOOD, **{field: value}).validate(vocab_size)
    assert [violation.field for violation in violations] == [named]
    assert violations[0].description


def test_all_violations_are_reported_at_once():
    bad = replace(GOOD, temperature=-1, top_p=2, n=0)
    assert [violation.field for violation in bad.validate(VOCAB)] == ["temperature", "top_p", "n"]


def test_logprobs_cannot_exceed_a_small_vocabulary():
    assert [v.field for v in replace(GOOD, logprobs=9).validate(8)] == ["logprobs"]


def test_every_parameter_of_the_public_request_is_here():
    assert {field.name for field in fields(SamplingParams)} == {
        "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_token_ids",
        "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs",
        "prompt_logprobs",
    }  # fmt: skip


def test_finish_reason():
    params = replace(GOOD, max_tokens=3, stop_token_ids=(7,))
    assert finish_reason(params, 5, 1, (2,)) is None
    assert finish_reason(params, 5, 3, (2,)) == "length"
    assert finish_reason(params, 2, 1, (2, 9)) == "stop"
    assert finish_reason(params, 7, 1, (2,)) == "stop"
    assert finish_reason(params, 2, 3, (2,)) == "stop"  # a stop at the limit is a stop
    ignoring = replace(params, ignore_eos=True)
    assert finish_reason(ignoring, 2, 1, (2,)) is None
    assert finish_reason(ignoring, 7, 1, (2,)) == "stop"


def test_drawn_seeds_are_valid_and_differ():
    seeds = {draw_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(replace(GOOD, seed=seed).validate(VOCAB) == [] and seed < 2**53 for seed in seeds)


def test_no_torch_is_loaded():
    code = "import sys; import shared.sampling_params; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
