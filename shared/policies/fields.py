"""Typed reads of config.json, whose errors name the field. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.model_files import ModelError

Config = Mapping[str, object]
Renamed = Mapping[str, str | tuple[str, ...]]


class UnsupportedModelError(ModelError):
    """The config asks for something that is not computed; the message names the field and what would do."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"config.json: {field}: {problem}")
        self.field = field


@dataclass(frozen=True)
class Setting:
    """A record's true or false, as a field of config.json says it."""

    field: str
    default: bool = False
    inverted: bool = False


class Fields:
    """A config of a family. Null is a value of its own: it takes the derived default, not the family's.

    renamed: the common name of a field, which is what the readers ask for -> the family's own, or those that it has
    had, the one of today first.
    """

    def __init__(self, values: Config, renamed: Renamed | None = None, prefix: str = "") -> None:
        self.values, self.renamed, self.prefix = values, renamed or {}, prefix

    def name(self, field: str) -> str:
        """As errors call it."""
        return self.prefix + self._names(field)[0]

    def get(self, field: str, default: object = None) -> object:
        given = (self.values.get(name) for name in self._names(field))
        return next((value for value in given if value is not None), default)

    def _names(self, field: str) -> tuple[str, ...]:
        names = self.renamed.get(field, field)
        return (names,) if isinstance(names, str) else names

    def integer(self, field: str, default: int | None = None) -> int:
        value = self.get(field, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UnsupportedModelError(self.name(field), f"wants a whole number, has {value!r}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self.get(field, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UnsupportedModelError(self.name(field), f"wants a number, has {value!r}")
        return float(value)

    def optional_number(self, field: str) -> float | None:
        return None if self.get(field) is None else self.number(field)

    def flag(self, field: str, default: bool = False) -> bool:
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise UnsupportedModelError(self.name(field), f"wants true or false, has {value!r}")
        return value

    def integers(self, field: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        value = self.get(field, list(default))
        if not isinstance(value, list) or not all(isinstance(one, int) for one in value):
            raise UnsupportedModelError(self.name(field), f"wants a list of whole numbers, has {value!r}")
        return tuple(value)

    def numbers(self, field: str) -> tuple[float, ...]:
        value = self.get(field)
        if not isinstance(value, list) or not all(isinstance(one, int | float) for one in value):
            raise UnsupportedModelError(self.name(field), f"wants a list of numbers, has {value!r}")
        return tuple(float(one) for one in value)

    def table(self, field: str) -> Fields:
        """An object within the config; its errors name both."""
        value = self.get(field, {})
        if not isinstance(value, dict):
            raise UnsupportedModelError(self.name(field), f"wants an object, has {value!r}")
        return Fields(value, prefix=f"{self.name(field)}.")

    def per_layer(self, field: str, kinds: tuple[str, ...]) -> tuple[str, ...] | None:
        """A list with one of these words for each layer; None where there is none."""
        types = self.get(field)
        if types is None:
            return None
        num_layers = self.integer("num_hidden_layers")
        if not isinstance(types, list) or len(types) != num_layers:
            raise UnsupportedModelError(self.name(field), f"wants {num_layers} entries, one per layer")
        unknown = sorted({str(kind) for kind in types} - set(kinds))
        if unknown:
            raise UnsupportedModelError(self.name(field), f"{unknown[0]!r} is not {' or '.join(kinds)}")
        return tuple(str(kind) for kind in types)

    def refuse(self, field: str, why: str, unless: object = None) -> None:
        """UnsupportedModelError if the field is set, and to something else than `unless`."""
        if (value := self.get(field)) and value != unless:
            raise UnsupportedModelError(self.name(field), why)
