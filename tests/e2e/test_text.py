"""Text through the whole service, with the default model: tokens as Hugging Face makes them, characters never torn,
stop strings wherever the tokens end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from tandem.v1 import inference_pb2, types_pb2
from transformers import AutoTokenizer

from tests.cluster import Cluster, OutputResult, Result
from tests.e2e import prompts
from tests.e2e.faults import ask

STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH
TEXTS = (
    *prompts.TEXTS,
    " leading",
    "trailing ",
    "tabs\t\tand\n\n\nlines",
    "Ω≈ç√∫˜µ",
    "👩‍👩‍👧‍👦🇫🇷",
    "\u200bzero width",
    "0123456789" * 5,
)


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_model)


def chat(*turns: tuple[str, str], **sampling: Any) -> inference_pb2.GenerateRequest:
    request = ask("", **sampling)
    request.messages.messages.extend(inference_pb2.ChatMessage(role=role, content=content) for role, content in turns)
    return request


async def answer(cluster: Cluster, request: inference_pb2.GenerateRequest) -> OutputResult:
    return (await cluster.generate(request)).outputs[0]


async def test_tokens_are_hugging_faces(cluster: Cluster, tokenizer: Any) -> None:
    for text in TEXTS:
        reply = await cluster.stub.Tokenize(inference_pb2.TokenizeRequest(text=text))
        assert list(reply.token_ids) == tokenizer(text)["input_ids"]
        assert reply.rendered == text
        back = await cluster.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=reply.token_ids))
        assert back.text == text
    for turns in prompts.CHATS:
        messages = [{"role": role, "content": content} for role, content in turns]
        request = inference_pb2.TokenizeRequest(messages=chat(*turns).messages)
        reply = await cluster.stub.Tokenize(request)
        assert reply.rendered == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert list(reply.token_ids) == tokenizer(reply.rendered, add_special_tokens=False)["input_ids"]


async def test_special_tokens_in_a_text(cluster: Cluster, tokenizer: Any) -> None:
    text = "a <|im_end|> b"
    ids = tokenizer(text)["input_ids"]
    for keep in (False, True):
        request = inference_pb2.DetokenizeRequest(token_ids=ids, keep_special_tokens=keep)
        expected = tokenizer.decode(ids, skip_special_tokens=not keep)
        assert (await cluster.stub.Detokenize(request)).text == expected


async def chunks_of(cluster: Cluster, request: inference_pb2.GenerateRequest) -> tuple[Result, dict[int, list[str]]]:
    """A whole answer, and the pieces of text that each output came in."""
    result, texts = Result(), {}
    async for chunk in cluster.stub.Generate(request):
        result.add(chunk)
        for output in chunk.outputs:
            texts.setdefault(output.index, []).append(output.text)
    return result, texts


async def test_characters_are_never_torn(cluster: Cluster, tokenizer: Any) -> None:
    """At a temperature at which the model writes in every script; what is no character at all shows as U+FFFD."""
    requests = [ask(text, max_tokens=40, temperature=1.5, seed=i, n=4) for i, text in enumerate(prompts.TEXTS[3:7])]
    multibyte = 0
    for result, texts in await asyncio.gather(*(chunks_of(cluster, request) for request in requests)):
        for index, output in result.outputs.items():
            assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)
            replaced = output.text.count("\ufffd")
            assert sum(text.count("\ufffd") for text in texts[index]) == replaced
            multibyte += not output.text.isascii()
    assert multibyte > 8


async def test_stop_strings(cluster: Cluster) -> None:
    prompt = "Once upon a time, in a land far away,"
    free = await answer(cluster, ask(prompt, max_tokens=48))
    words = free.text.split(" ")
    assert len(words) > 20
    # in the middle of words, over spaces: tokens of this model begin with the space before a word
    for stop in (words[4][-2:] + " " + words[5][:2], words[7][-1:] + " " + words[8] + " " + words[9][:1]):
        stopped = await answer(cluster, ask(prompt, max_tokens=48, stop=[stop]))
        assert stopped.text == free.text[: free.text.index(stop)]
        assert (stopped.finish_reason, stopped.stop_match) == (STOP, stop)
        assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    only_once = [word for word in words if free.text.count(word) == 1]
    early, late = only_once[1], only_once[-2]
    assert free.text.index(early) < free.text.index(late)
    both = await answer(cluster, ask(prompt, max_tokens=48, stop=[late, early, "never there"]))
    assert both.stop_match == early
    # what could have become a stop string, and did not, is not kept back for ever
    beginning = free.text[-6:] + "☃"
    whole = await answer(cluster, ask(prompt, max_tokens=48, stop=[beginning]))
    assert (whole.text, whole.finish_reason) == (free.text, LENGTH)
    # the prompt's own text stops nothing
    assert (await answer(cluster, ask(prompt, max_tokens=48, stop=["far away,"]))).text == free.text


async def test_stop_strings_of_many_bytes(cluster: Cluster) -> None:
    free = await answer(cluster, ask("北京是中国的首都，", max_tokens=40))
    wide = [i for i, character in enumerate(free.text) if ord(character) > 0x2000]
    assert len(wide) > 6
    stop = free.text[wide[5] : wide[5] + 2]
    stopped = await answer(cluster, ask("北京是中国的首都，", max_tokens=40, stop=[stop]))
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.stop_match == stop


async def test_the_end_of_a_turn(cluster: Cluster, tokenizer: Any) -> None:
    """The end token ends an answer, with stop strings too, and is no part of its text."""
    question = ("user", "What is the capital of France? Answer in one word.")
    plain = await answer(cluster, chat(question, max_tokens=80, ignore_eos=False))
    assert plain.finish_reason == STOP
    assert plain.token_ids[-1] == tokenizer.eos_token_id
    assert plain.text == tokenizer.decode(plain.token_ids[:-1])
    stops = await answer(cluster, chat(question, max_tokens=80, ignore_eos=False, stop=["never there"]))
    assert stops == plain
    past = await answer(cluster, chat(question, max_tokens=80))
    assert len(past.token_ids) == 80
    assert past.token_ids[: len(plain.token_ids)] == plain.token_ids
    first = plain.token_ids[1]
    at_token = await answer(cluster, chat(question, max_tokens=80, stop_token_ids=[first]))
    end = plain.token_ids.index(first)
    assert at_token.token_ids == plain.token_ids[: end + 1]
    assert at_token.text == tokenizer.decode(plain.token_ids[:end])


async def test_names_of_tokens(cluster: Cluster, tokenizer: Any) -> None:
    output = await answer(cluster, ask("The capital of France is", max_tokens=12, logprobs=3))
    for token_id, position in zip(output.token_ids, output.logprobs, strict=True):
        assert position.chosen.token_id == token_id
        for named in (position.chosen, *position.top):
            assert named.text == tokenizer.decode([named.token_id])
    assert "".join(position.chosen.text for position in output.logprobs) == output.text


async def test_both_ports_say_the_same(cluster: Cluster) -> None:
    turns = [("system", "You answer in one short sentence."), ("user", "Name three colors.")]
    expected = await answer(cluster, chat(*turns, max_tokens=30, ignore_eos=False))
    body = {
        "messages": [{"role": role, "content": content} for role, content in turns],
        "max_tokens": 30,
        "temperature": 0,
    }
    async with httpx.AsyncClient(base_url=cluster.http_url, timeout=60, trust_env=False) as client:
        reply = (await client.post("/v1/chat/completions", json=body)).json()
    assert reply["choices"][0]["message"]["content"] == expected.text
    assert reply["usage"]["completion_tokens"] == len(expected.token_ids)
