"""What a request may say: a field at fault is named, one left unset gets the model's or the contract's value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import grpc
import pytest
from tandem.v1 import inference_pb2, types_pb2

from gateway.model import SamplingDefaults
from gateway.resolution import Limits, check_labels, check_model, resolve_sampling, tokenize_prompt
from shared.rpc import RpcError
from tests.scripted_scene import model
from tests.scripted_workers import TOKENIZER

MODEL = model()
LIMITS = Limits(max_context=64, vocab_size=402)
Request = inference_pb2.GenerateRequest


def turns(*pairs: tuple[str, str]) -> inference_pb2.ChatMessages:
    return inference_pb2.ChatMessages(
        messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in pairs]
    )


def refusal(error: pytest.ExceptionInfo[RpcError]) -> str | None:
    assert error.value.code == grpc.StatusCode.INVALID_ARGUMENT
    return error.value.field


@pytest.mark.parametrize(
    ("request_", "field", "why"),
    [
        (Request(), "prompt", "is missing"),
        (Request(text=""), "text", "has no tokens"),
        (Request(text="a b " * 60), "text", "leaves no room"),
        (Request(text="x" * 10_000), "text", "bytes"),
        (Request(token_ids=inference_pb2.TokenIds()), "token_ids", "has no tokens"),
        (Request(token_ids=inference_pb2.TokenIds(ids=[1, 402])), "token_ids.ids[1]", "outside the vocabulary of 402"),
        (Request(token_ids=inference_pb2.TokenIds(ids=[2**32 - 1])), "token_ids.ids[0]", "outside"),
        (Request(token_ids=inference_pb2.TokenIds(ids=[1] * 64)), "token_ids", "64 tokens"),
        (Request(messages=turns()), "messages.messages", "is empty"),
        (Request(messages=turns(("", "hi"))), "messages.messages[0].role", "1 to 64"),
        (Request(messages=turns(("robot", "hi"))), "messages", "no robots"),
        (Request(messages=turns(*[("user", "hi")] * 5000)), "messages.messages", "at most 4096"),
        (Request(messages=turns(("user", "x" * 10_000))), "messages", "exceeds"),
    ],
)
async def test_prompts_that_are_refused(request_: Request, field: str, why: str) -> None:
    with pytest.raises(RpcError, match=why) as error:
        await tokenize_prompt(request_, MODEL, LIMITS)
    assert refusal(error) == field


async def test_a_prompt_may_leave_room_for_one_token() -> None:
    prompt, _ = await tokenize_prompt(Request(token_ids=inference_pb2.TokenIds(ids=[1] * 63)), MODEL, LIMITS)
    resolved = resolve_sampling(types_pb2.SamplingParams(), MODEL.defaults, len(prompt), LIMITS)
    assert resolved.max_tokens == 1


async def test_messages_go_through_the_template() -> None:
    token_ids, text = await tokenize_prompt(Request(messages=turns(("user", "hello"), ("bot", "é"))), MODEL, LIMITS)
    assert text == "<user>hello<bot>é"
    assert token_ids == TOKENIZER.encode(text)


async def test_a_long_text_is_tokenized_as_a_short_one() -> None:
    text = "hello world, " * 2000
    limits = Limits(max_context=100_000, vocab_size=402)
    token_ids, _ = await tokenize_prompt(Request(text=text), MODEL, limits)
    assert token_ids == TOKENIZER.encode(text)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
    ],
)
def test_labels_that_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RpcError) as error:
        check_labels(Request(**fields))
    assert refusal(error) == field


def test_labels_that_are_taken() -> None:
    check_labels(Request(request_id="é" * 128, cache_salt="x" * 256))


def test_models() -> None:
    check_model("", MODEL)
    check_model("scripted", MODEL)
    with pytest.raises(RpcError) as error:
        check_model("gpt-17", MODEL)
    assert error.value.code == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 55}, "max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop_token_ids": [1, 402]}, "stop_token_ids[1]"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {402: 1.0}}, "logit_bias[402]"),
        ({"logprobs": 1000}, "logprobs"),
        ({"prompt_logprobs": 1000}, "prompt_logprobs"),
        ({"grammar": types_pb2.Grammar(json_object=True)}, "grammar"),
    ],
)
def test_sampling_that_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RpcError) as error:
        resolve_sampling(types_pb2.SamplingParams(**fields), MODEL.defaults, 10, LIMITS)
    assert refusal(error) == f"sampling.{field}"


def test_every_fault_is_named() -> None:
    with pytest.raises(RpcError, match=r"sampling\.top_p: .*sampling\.n: "):
        resolve_sampling(types_pb2.SamplingParams(top_p=3, n=0), MODEL.defaults, 10, LIMITS)


def test_what_is_left_unset() -> None:
    resolved = resolve_sampling(types_pb2.SamplingParams(), SamplingDefaults(), 10, LIMITS)
    unset = [
        field.name
        for field in types_pb2.SamplingParams.DESCRIPTOR.fields
        if field.has_presence and not resolved.HasField(field.name)  # pyright: ignore[reportArgumentType]
    ]
    assert unset == ["logprobs", "prompt_logprobs", "grammar"]
    assert (resolved.max_tokens, resolved.temperature, resolved.top_p, resolved.n) == (54, 1.0, 1.0, 1)
    seeds = {resolve_sampling(types_pb2.SamplingParams(), SamplingDefaults(), 10, LIMITS).seed for _ in range(20)}
    assert len(seeds) == 20


def test_the_models_own_defaults_count_where_the_request_says_nothing() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)
    resolved = resolve_sampling(types_pb2.SamplingParams(top_k=0, temperature=0), defaults, 10, LIMITS)
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.repetition_penalty) == (0, 0.9, 0, 1.1)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, SamplingDefaults()),
        ({"eos_token_id": 2}, SamplingDefaults()),
        ({"do_sample": False, "temperature": 0.6}, SamplingDefaults(temperature=0.6)),
        ({"do_sample": True, "top_k": 20, "top_p": None}, SamplingDefaults(top_k=20)),
    ],
)
def test_defaults_from_the_models_folder(
    tmp_path: Path, file: dict[str, Any] | None, expected: SamplingDefaults
) -> None:
    if file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert SamplingDefaults.load(tmp_path) == expected


def test_the_resolved_parameters_can_be_sent_again() -> None:
    first = resolve_sampling(
        types_pb2.SamplingParams(stop=["a"], stop_token_ids=[3], logit_bias={4: -1.0}, logprobs=0),
        SamplingDefaults(temperature=0.3),
        10,
        LIMITS,
    )
    assert resolve_sampling(first, SamplingDefaults(), 10, LIMITS) == first
