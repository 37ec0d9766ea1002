"""Chat turns to the text that a model was trained on, by the model's own Jinja template, rendered as transformers does.

    template = ChatTemplate.load(model_files.folder, tokenizer.special_tokens)
    text = template.render([{"role": "user", "content": "Hello"}], max_characters=100_000)

Templates come with models, so they run in Jinja's sandbox, and what they write is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the message says why."""


class ChatTemplate:
    """A compiled template.

    source: the template's text. special_tokens: names such as `bos_token` and the tokens they stand for.
    Raises ChatTemplateError if the template itself is not Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template is not valid: {error}") from error

    @classmethod
    def load(cls, folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """The template of a model's folder, None if it has none: chat_template.jinja, else tokenizer_config.json."""
        source = _read_source(folder)
        return None if source is None else cls(source, special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_characters: int,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation, ending where the model's turn begins.

        Raises ChatTemplateError if the template refuses the messages or writes more than max_characters.
        """
        pieces: list[str] = []
        left = max_characters
        try:
            for piece in self._template.generate(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    raise ChatTemplateError(f"the rendered conversation exceeds {max_characters} characters")
        except ChatTemplateError:
            raise
        except jinja2.TemplateError as error:
            raise ChatTemplateError(error.message or type(error).__name__) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError) as error:
            # what the template's own expressions raise on messages it does not expect
            raise ChatTemplateError(f"the model's chat template cannot render these messages: {error}") from error
        return "".join(pieces)


def _read_source(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template:
            return template
    return None


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    # local time, as in transformers, so that both render the same date
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """`dict` without the attributes of a type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **values)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that takes no private names."""

    def __init__(*args: Any, **values: Any) -> None:
        self, args = args[0], args[1:]
        given = dict(*args, **values)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no private name such as {name!r}")


class _GenerationTag(Extension):
    """`{% generation %}` marks the model's own words for training; here it only passes them on."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass_on"), [], [], body).set_lineno(line)

    def _pass_on(self, caller: Any) -> str:
        return caller()
