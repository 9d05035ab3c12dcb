"""Typed access to a JSON record that somebody else wrote: every value is checked where it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ...errors import ModelError

MAX_INTEGER = 1 << 40  # above every size of a model, low enough that products stay small


def _is_positive(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 < value <= 1e30


class Record:
    """A mapping and the file that it is from, for messages. A value of null reads as if it were absent."""

    def __init__(self, values: Mapping[str, Any], path: Path, where: str = "") -> None:
        self._values = values
        self._path = path
        self._where = where

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def error(self, what: str) -> ModelError:
        """``what`` says what this record has, and what is supported."""
        return ModelError(f"{self._path} {what}; use another model")

    def with_defaults(self, defaults: Mapping[str, Any]) -> Record:
        """The same record with values for keys that it does not have; a null in it stays."""
        return Record({**defaults, **self._values}, self._path, self._where)

    def part(self, values: Mapping[str, Any]) -> Record:
        """A record made of values of this one, for the same messages."""
        return Record(values, self._path, self._where)

    def inner(self, key: str) -> Record:
        """A record within."""
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise self._wrong(key, "a record")
        return Record(value, self._path, f"{self._where}{key}.")

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_INTEGER) -> int:
        value = default if self.get(key) is None else self.get(key)
        if type(value) is float and math.isfinite(value) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = default if self.get(key) is None else self.get(key)
        if not _is_positive(value):
            raise self._wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def integers(self, key: str, count: int) -> list[int]:
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count or not all(type(item) in (int, bool) for item in value):
            raise self._wrong(key, f"a list of {count} whole numbers")
        return [int(item) for item in value]

    def numbers(self, key: str, count: int) -> list[float]:
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count or not all(map(_is_positive, value)):
            raise self._wrong(key, f"a list of {count} positive numbers")
        return [float(item) for item in value]

    def present(self, names: Mapping[str, str]) -> dict[str, float]:
        """Those of the numbers that are there, under other names."""
        return {theirs: self.number(ours) for ours, theirs in names.items() if self.get(ours) is not None}

    def _wrong(self, key: str, wanted: str) -> ModelError:
        value = self.get(key)
        shown = f"no {self._where}{key}" if value is None else f"{self._where}{key} {value!r:.60}"
        return self.error(f"has {shown}, which must be {wanted}")
