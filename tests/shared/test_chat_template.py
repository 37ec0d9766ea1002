"""Chat templates: the text that transformers renders, and no more than the sandbox allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shared.chat_template import ChatTemplate, ChatTemplateError
from shared.tokenizer import Tokenizer
from tests import tiny_tokenizers

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

ALTERNATING = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set state = namespace(number=0) %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user and assistant, got ' ~ message['role']) }}
    {%- endif %}
    {%- set state.number = state.number + 1 %}
    {%- if message['role'] == 'user' %}
        {%- set before = system ~ '\\n\\n' if loop.first and system is defined else '' %}
        {{- '[INST] ' ~ before ~ message['content'] ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ message['content'] | trim ~ eos_token }}
    {%- endif %}
{%- endfor %}
{#- state.number turns were written #}
"""

HEADERS = """\
{% set today = strftime_now("%Y") %}
<|system|>
Year {{ today }}; {{ {"roles": messages | map(attribute="role") | list, "note": "é <&>"} | tojson }}
{{ dict(a=1) | tojson(indent=2) }} {{ messages | length | tojson }}
{% for message in messages %}
    {% if message.role == "assistant" %}
{% generation %}<|assistant|>{{ message.content }}{% endgeneration %}

    {% elif loop.index > 6 %}
        {% break %}
    {% else %}
<|{{ message.role }}|>{{ message["content"].strip() }}
    {% endif %}
{% endfor %}
{% if tools %}tools{% endif %}{% if documents %}documents{% endif %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is gravity?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi! \n"}],
    [
        {"role": "user", "content": "用中文说你好 🚀"},
        {"role": "assistant", "content": "  你好  "},
        {"role": "user", "content": "{{ not_a_template }} {% raw %} <b>&</b>"},
    ],
    [{"role": "user", "content": ""}],
]


def transformers_template(source: str) -> PreTrainedTokenizerFast:
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizers.byte_level(), **SPECIAL)
    tokenizer.chat_template = source
    return tokenizer


def render(source: str, messages: list[dict[str, str]], max_characters: int = 10_000, **options: Any) -> str:
    return ChatTemplate(source, SPECIAL).render(messages, max_characters=max_characters, **options)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("source", [ALTERNATING, HEADERS])
def test_renders_as_transformers_does(source: str, messages: list[dict[str, str]], prompted: bool) -> None:
    expected = transformers_template(source).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompted
    )
    assert render(source, messages, add_generation_prompt=prompted) == expected


@pytest.mark.parametrize("messages", CHATS)
def test_the_default_models_template_and_ids_are_transformers(
    default_model: Path, messages: list[dict[str, str]]
) -> None:
    reference = AutoTokenizer.from_pretrained(default_model)
    tokenizer = Tokenizer.load(default_model)
    template = ChatTemplate.load(default_model, tokenizer.special_tokens)
    assert template is not None
    text = template.render(messages, max_characters=10_000)
    assert text == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(ChatTemplateError, match="Roles must alternate user and assistant, got assistant"):
        render(ALTERNATING, [{"role": "assistant", "content": "I begin"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[9]['content'] }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].nothing.more }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'x' * (10 ** 12) }}",
    ],
)
def test_a_template_that_breaks_on_the_messages_is_an_error_of_the_messages(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(source, CHATS[0])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.sys }}",
        "{% set n = namespace(_private=1) %}",
        "{% set n = namespace() %}{% set n._private = 1 %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(source, CHATS[0])


def test_the_output_is_bounded() -> None:
    source = "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="exceeds 5000 characters"):
        render(source, CHATS[0], max_characters=5000)


def test_a_template_that_is_not_jinja() -> None:
    with pytest.raises(ChatTemplateError, match="not valid"):
        ChatTemplate("{% if %}", SPECIAL)


def test_where_templates_are_found(tmp_path: Path) -> None:
    def text() -> str | None:
        template = ChatTemplate.load(tmp_path, SPECIAL)
        return template and template.render(CHATS[0], max_characters=100)

    assert text() is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<s>"}))
    assert text() is None
    config.write_text(json.dumps({"chat_template": "one"}))
    assert text() == "one"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "two"}]}))
    assert text() == "two"
    (tmp_path / "chat_template.jinja").write_text("three {{ eos_token }}")
    assert text() == "three </s>"
