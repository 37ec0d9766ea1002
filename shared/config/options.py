"""What the engine's options share: how they are given, by which names, and what "auto" and a deprecated name mean.

A field is given by its name or its alias; unknown keys are refused. A value "auto" is as good as none, unless
`strict=True` is given beside it. An assignment is checked like a new object, and changes nothing if it is refused.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]


def only(value: object, why: str) -> AfterValidator:
    """Refuses every other value."""

    def check(given: Any) -> Any:
        if given != value:
            raise ValueError(f"{given!r} is refused: {why}")
        return given

    return AfterValidator(check)


@dataclass(frozen=True)
class Deprecated:
    """A name that is no field any more. `to`: the section.field that stands for it, None for a name that is left with
    nothing to say: its only value is "auto".
    """

    to: str | None = None
    alias: str | None = None


class Options(BaseModel):
    """Base of the engine's options."""

    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        populate_by_name=True,
        loc_by_alias=False,  # an error names the field, by whichever name it was given
        arbitrary_types_allowed=True,
    )

    deprecated: ClassVar[Mapping[str, Deprecated]] = {}

    @classmethod
    def of(cls, config: Self | Mapping[str, Any] | str | os.PathLike[str] | None = None, **kwargs: Any) -> Self:
        """From nothing, from a dictionary or the path of a JSON file, from keyword arguments, or from both.

        `config` may be an object of this class too: without keyword arguments it is returned as it is. A dictionary is
        not changed, nor held. Raises pydantic.ValidationError, which is a ValueError, for what the class refuses;
        ValueError for a field that is given two values, a file that holds no JSON object, and another type; OSError
        for a file that cannot be read.
        """
        if isinstance(config, cls) and not kwargs:
            return config
        values: Mapping[str, Any]
        if isinstance(config, cls):
            values = config.given()
        elif isinstance(config, str | os.PathLike):
            values = _read(Path(config))
        elif config is None:
            values = {}
        elif isinstance(config, Mapping):
            values = config
        else:
            raise ValueError(f"'config' argument expected string or dictionary, got {type(config)}")
        strict = _strict({**values, **kwargs})
        # an object's "auto" is a value: it was made so
        ours, theirs = cls._named(values, strict or isinstance(config, cls)), cls._named(kwargs, strict)
        for name in [name for name in theirs if name in ours]:
            if cls._meaning(name, ours[name]) != cls._meaning(name, theirs[name]):
                keys = sorted({repr(key) for key in (*values, *kwargs) if cls._names().get(key, key) == name})
                raise ValueError(
                    f"Conflicting argument {' / '.join(keys)}: {ours[name]!r} in 'config', {theirs[name]!r} as a "
                    "keyword argument; leave one of them out"
                )
        return cls.model_validate({**ours, **theirs, "strict": True})  # what was "auto" is gone

    def given(self) -> dict[str, Any]:
        """What is set, by the fields' names; of a section, what is set in it."""
        found = dict[str, Any]()
        for name, value in self.__dict__.items():
            if isinstance(value, Options):
                if section := value.given():
                    found[name] = section
            elif name in self.model_fields_set:
                found[name] = value
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields:
            known = self._names().get(name, name)
            hint = self.deprecated[known].to if known in self.deprecated else known
            raise ValueError(
                f"{name}: no field of {type(self).__name__}" + (f"; set {hint}" if hint and hint != name else "")
            )
        sections = {key: held for key, held in self.__dict__.items() if isinstance(held, Options)}
        checked = type(self).model_validate({**self.given(), **sections, "strict": True, name: value})
        object.__setattr__(self, "__dict__", checked.__dict__)
        object.__setattr__(self, "__pydantic_fields_set__", set(checked.given()))

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        strict = _strict(data)
        values = cls._named(data, strict)
        values.pop("strict", None)
        for name in [name for name in cls.deprecated if name in values]:
            cls._replace(name, values)
        if strict:
            for name, value in values.items():
                if cls._section(name) and isinstance(value, dict):
                    values[name] = {"strict": True, **value}
        return values

    @classmethod
    def _named(cls, data: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        """The same by the fields' names, without "auto" unless `strict`; its containers are copies."""
        names, values = cls._names(), dict[str, Any]()
        for key, value in data.items():
            name = names.get(key, key)
            old = cls.deprecated.get(name)
            if isinstance(value, str) and value == "auto" and not strict and (old is None or old.to):
                continue
            if name in values and cls._meaning(name, values[name]) != cls._meaning(name, value):
                raise ValueError(f"Conflicting argument {key!r}: {name} is given two values; leave one of them out")
            section = cls._section(name)
            if section is not None and isinstance(value, Mapping):
                value = section._named(value, strict)
            values[name] = _copied(value)
        return values

    @classmethod
    def _replace(cls, name: str, values: dict[str, Any]) -> None:
        """Puts the value of a deprecated name where it belongs now."""
        value, to = values.pop(name), cls.deprecated[name].to
        if to is None:
            if value != "auto":
                raise ValueError(f"{name}: {value!r} is not supported; it is deprecated, leave it out")
            _warn(f"{name} is deprecated and has no effect; leave it out")
            return
        section, _, field = to.partition(".")
        kind = cls._section(section)
        given = kind._given_in(values.get(section, {})) if kind else None
        if given is None:  # no section at all, which validation tells
            return
        if field in given:
            raise AssertionError(
                f"Cannot provide deprecated parameter '{name}' and replacing parameter '{to}' together"
            )
        _warn(f"{name} is deprecated; give {to} instead")
        values[section] = {**given, field: value}

    @classmethod
    def _given_in(cls, value: Any) -> dict[str, Any] | None:
        """What a value given for this section sets, by the fields' names; None for a value that is no section."""
        if isinstance(value, cls):
            return value.given()
        return cls._named(value, strict=True) if isinstance(value, Mapping) else None

    @classmethod
    def _meaning(cls, name: str, value: Any) -> Any:
        """Equal for two values of a field that say the same."""
        section = cls._section(name)
        given = section._given_in(value) if section else None
        if section and given is not None:
            fields = {
                key: field.get_default(call_default_factory=True, validated_data={})
                for key, field in section.model_fields.items()
            }
            return {key: section._meaning(key, item) for key, item in {**fields, **given}.items()}
        return list(value) if isinstance(value, tuple) else value

    @classmethod
    def _section(cls, name: str) -> type[Options] | None:
        kind = cls.model_fields[name].annotation if name in cls.model_fields else None
        return kind if isinstance(kind, type) and issubclass(kind, Options) else None

    @classmethod
    def _names(cls) -> dict[str, str]:
        """Alias → name, of fields and of deprecated names."""
        fields = {field.alias: name for name, field in cls.model_fields.items() if field.alias}
        return fields | {old.alias: name for name, old in cls.deprecated.items() if old.alias}


def _strict(values: Mapping[str, Any]) -> bool:
    strict = values.get("strict", False)
    if not isinstance(strict, bool):
        raise ValueError(f"strict: wants true or false, has {strict!r}")
    return strict


def _copied(value: Any) -> Any:
    """A container of its own, of copies; what is no container stays itself: it may be a class or a process group."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return values


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values = dict[str, Any]()
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} stands twice in one object")
        values[key] = value
    return values


def _warn(message: str) -> None:
    """A DeprecationWarning of the line that gave the options: Python shows those of a user's own file only."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("shared", "pydantic"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DeprecationWarning, stacklevel=level)
