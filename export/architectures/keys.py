"""Typed access to the metadata of a model file, under the keys of its architecture."""

from __future__ import annotations

import math
from typing import Any

from ...errors import ModelError
from ..sources import Source

OWN_PREFIX = "satchel."


class Keys:
    """Typed access to the metadata keys of one architecture."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._prefix = source.architecture

    def get(self, key: str) -> Any:
        """The value, or the one under ``satchel.``, where our GGUF files have what llama.cpp has no key for."""
        name = f"{self._prefix}.{key}"
        return self._source.metadata.get(name, self._source.metadata.get(f"{OWN_PREFIX}{name}"))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # some converters write one number per layer
        if value is None:
            value = default
        if not isinstance(value, int):
            raise self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def flags(self, key: str, count: int) -> list[bool] | None:
        """One truth value per layer; None when the key is absent or holds a single value."""
        value = self.get(key)
        if not isinstance(value, list):
            return None
        if len(value) != count:
            raise self._wrong(key, value, f"a list of {count}, one value for each layer")
        return [bool(item) for item in value]

    def windows(self, layers: int, period: int = 0) -> tuple[int, ...]:
        """``attention.sliding_window`` of each layer; 0: it sees everything.

        The layers that see everything are every ``period``-th (0: none of them), unless
        ``attention.sliding_window_pattern`` gives another period, or one truth value per layer (true: windowed).
        """
        window = self.integer("attention.sliding_window", 0)
        window = window if window < self.integer("context_length") else 0
        pattern = self.flags("attention.sliding_window_pattern", layers)
        if pattern is not None:
            return tuple(window if windowed else 0 for windowed in pattern)
        period = self.integer("attention.sliding_window_pattern", period)
        return tuple(0 if period > 0 and (layer + 1) % period == 0 else window for layer in range(layers))

    def _wrong(self, key: str, value: object, wanted: str) -> ModelError:
        shown = "missing" if value is None else repr(value)[:60]
        return ModelError(
            f"{self._source.path}: {self._prefix}.{key} is {shown}, not {wanted}; use another file"
        )
