"""Bodies of OpenAI requests: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tandem.v1 import inference_pb2, types_pb2

from gateway.openai_chat import ChatRequest
from gateway.openai_completion import MAX_PROMPTS, CompletionRequest
from gateway.openai_error import OpenAIError
from gateway.openai_schema import IGNORED, NEUTRAL, OpenAIRequest

HELLO = [{"role": "user", "content": "hello"}]


def protos(kind: type[OpenAIRequest], **body: Any) -> list[inference_pb2.GenerateRequest]:
    return kind.parse(json.dumps(body).encode()).to_protos()


def refusal(kind: type[OpenAIRequest], body: bytes | dict[str, Any]) -> OpenAIError:
    with pytest.raises(OpenAIError) as caught:
        kind.parse(body if isinstance(body, bytes) else json.dumps(body).encode()).to_protos()
    assert caught.value.status == 400
    return caught.value


def test_every_parameter_arrives() -> None:
    [request] = protos(
        CompletionRequest,
        model="m",
        prompt="p",
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=7,
        n=3,
        best_of=3,
        stop=["a", "b"],
        stop_token_ids=[4, 5],
        ignore_eos=True,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        repetition_penalty=1.5,
        logit_bias={"11": -100, "12": 2.5},
        logprobs=2,
        priority=-1,
        cache_salt="s",
    )
    assert request == inference_pb2.GenerateRequest(
        model="m",
        text="p",
        priority=-1,
        cache_salt="s",
        sampling=types_pb2.SamplingParams(
            max_tokens=5,
            min_tokens=2,
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.1,
            seed=7,
            n=3,
            stop=["a", "b"],
            stop_token_ids=[4, 5],
            ignore_eos=True,
            presence_penalty=0.25,
            frequency_penalty=-0.25,
            repetition_penalty=1.5,
            logit_bias={11: -100.0, 12: 2.5},
            logprobs=2,
        ),
    )


def test_what_is_not_given_is_left_to_the_gateway() -> None:
    [completion] = protos(CompletionRequest, prompt="p", temperature=None)
    assert completion.sampling == types_pb2.SamplingParams(max_tokens=16)
    [chat] = protos(ChatRequest, messages=HELLO)
    assert chat.sampling == types_pb2.SamplingParams()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [7]], ["a", [7]]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: Any, expected: list[Any]) -> None:
    found = protos(CompletionRequest, prompt=prompt)
    assert [r.text if r.HasField("text") else list(r.token_ids.ids) for r in found] == expected


def test_values_that_clients_write_differently() -> None:
    [request] = protos(CompletionRequest, prompt="p", stop="x", top_k=-1, seed=-1)
    assert request.sampling.stop == ["x"]
    assert request.sampling.HasField("top_k")
    assert request.sampling.top_k == 0
    assert request.sampling.seed == 2**64 - 1


def test_chat_turns() -> None:
    [request] = protos(
        ChatRequest,
        messages=[
            {"role": "developer", "content": "be brief", "name": "ops"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
        ],
        max_completion_tokens=9,
        max_tokens=9,
        logprobs=True,
    )
    turns = [(turn.role, turn.content) for turn in request.messages.messages]
    assert turns == [("system", "be brief"), ("user", "one\ntwo"), ("assistant", "")]
    assert request.sampling.max_tokens == 9
    assert request.sampling.HasField("logprobs")
    assert request.sampling.logprobs == 0


def test_fields_without_influence_are_ignored() -> None:
    ignored = dict.fromkeys(IGNORED, "anything")
    neutral = {name: values[0] if values else None for name, values in NEUTRAL.items()}
    assert protos(ChatRequest, messages=HELLO, **ignored, **neutral) == protos(ChatRequest, messages=HELLO)


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_fields_that_would_change_the_result_are_refused_by_name(name: str) -> None:
    error = refusal(ChatRequest, {"messages": HELLO, name: {"type": "json_object"}})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert name in error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "p", "temprature": 1}, "temprature"),
        ({"prompt": "p", "temperature": "1"}, "temperature"),
        ({"prompt": "p", "n": True}, "n"),
        ({"prompt": "p", "n": -1}, "n"),
        ({"prompt": "p", "max_tokens": 2**32}, "max_tokens"),
        ({"prompt": "p", "seed": 2**64}, "seed"),
        ({"prompt": "p", "logprobs": True}, "logprobs"),
        ({"prompt": "p", "stop": [1]}, "stop[0]"),
        ({"prompt": "p", "logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"prompt": "p", "stream_options": {"chunks": 1}}, "stream_options.chunks"),
        ({"prompt": "p", "deadline_s": 0}, "deadline_s"),
        ({"prompt": "p", "best_of": 2}, "best_of"),
        ({"prompt": "p", "echo": True, "logprobs": 0}, "echo"),
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**32]}, "prompt"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
    ],
)
def test_a_bad_completion_names_its_field(body: dict[str, Any], param: str) -> None:
    error = refusal(CompletionRequest, body)
    assert error.param == param
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"messages": HELLO, "prompt": "p"}, "prompt"),
    ],
)
def test_a_bad_chat_names_its_field(body: dict[str, Any], param: str) -> None:
    assert refusal(ChatRequest, body).param == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"text"', b'{"prompt":"\xff"}', b'{"prompt":NaN}', b"[" * 100_000]
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    assert refusal(CompletionRequest, body).code == "invalid_json"
