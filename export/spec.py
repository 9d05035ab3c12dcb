"""What a decoder is made of, apart from its weights: one frozen record, checked when it is made.

The spec is what the graph writer, the cache and the planner read; it says nothing about files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from ..errors import ModelError

ROPE_SCALINGS = ("none", "linear", "yarn", "llama3")
HEAD_SIZE_STEP = 16  # the attention kernels take whole vectors of 16 floats
MAX_HEAD_SIZE = 256
COLUMN_STEP = 32  # the packed weights have blocks of 32 along the input
# upper limits of the sizes: far above any model, low enough that products of them stay in 64 bits
LARGEST = {
    "layers": 1024, "hidden": 1 << 17, "heads": 1024, "kv_heads": 1024, "head_size": MAX_HEAD_SIZE,
    "feed_forward": 1 << 20, "vocab": 1 << 22, "context_length": 1 << 31,
}  # fmt: skip

Record = TypeVar("Record", "RopeSpec", "ModelSpec")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions, half-split: dimension i turns with dimension i + dims/2.

    ``frequency_factors`` (dims/2 numbers, or empty) divide the frequencies one by one; GGUF files of Llama 3
    carry their scaling in this form.
    """

    base: float
    dims: int
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0  # multiplies cos and sin (YaRN)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    frequency_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _require(
            self.scaling in ROPE_SCALINGS, "RoPE scaling", self.scaling, f"one of {', '.join(ROPE_SCALINGS)}"
        )
        _require(_positive(self.base) and self.base > 1, "RoPE base", self.base, "a number above 1")
        _require(self.dims > 0 and self.dims % 2 == 0, "RoPE dimensions", self.dims, "even and positive")
        _require(_positive(self.factor), "RoPE factor", self.factor, "a positive number")
        _require(_positive(self.attention_factor), "RoPE attention factor", self.attention_factor, "positive")
        if self.scaling in ("yarn", "llama3"):
            _require(self.original_context > 0, "original context", self.original_context, "positive")
        count = len(self.frequency_factors)
        _require(count in (0, self.dims // 2), "number of RoPE frequency factors", count, f"{self.dims // 2}")
        for value in self.frequency_factors:
            _require(_positive(value), "RoPE frequency factor", value, "a positive number")


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: L layers, H query heads, KV key-value heads of size D, as in the legend of the docs."""

    architecture: str
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocab: int
    context_length: int
    norm_epsilon: float
    rope: RopeSpec
    tied_embeddings: bool
    attention_scale: float
    attention_softcap: float = 0.0  # 0: none
    attention_window: int = 0  # 0: none

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name)
            good = isinstance(value, int) and 1 <= value <= most
            _require(good, name, value, f"a whole number from 1 to {most}")
        grouped = self.heads % self.kv_heads == 0
        _require(grouped, "heads", self.heads, f"a multiple of kv_heads ({self.kv_heads})")
        whole = self.head_size % HEAD_SIZE_STEP == 0
        _require(whole, "head_size", self.head_size, f"a multiple of {HEAD_SIZE_STEP} up to {MAX_HEAD_SIZE}")
        widths = {"hidden": self.hidden, "feed_forward": self.feed_forward}
        for name, width in (widths | {"heads x head_size": self.heads * self.head_size}).items():
            _require(width % COLUMN_STEP == 0, name, width, f"a multiple of {COLUMN_STEP}")
        _require(0 < self.norm_epsilon < 1, "norm_epsilon", self.norm_epsilon, "between 0 and 1")
        _require(_positive(self.attention_scale), "attention_scale", self.attention_scale, "positive")
        softcap, window, dims = self.attention_softcap, self.attention_window, self.rope.dims
        _require(0 <= softcap < math.inf, "attention_softcap", softcap, "0 or more")
        _require(window >= 0, "attention_window", window, "0 or more")
        _require(dims <= self.head_size, "RoPE dimensions", dims, f"at most {self.head_size}")

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers, in 16-bit floats."""
        return self.layers * self.kv_heads * self.head_size * 2 * 2

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and numbers, ready for ``json``."""
        value = asdict(self)
        value["rope"]["frequency_factors"] = list(self.rope.frequency_factors)
        return value

    @classmethod
    def from_json(cls, value: Any) -> ModelSpec:
        """The inverse of ``to_json``.

        Raises:
            ModelError: a key is missing or unknown, or a value is out of range.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("rope"), Mapping):
            raise ModelError("the package's spec is not a record with a rope record; export the model again")
        rope = dict(value["rope"])
        try:
            rope["frequency_factors"] = tuple(rope.get("frequency_factors", ()))
            return _record(cls, {**value, "rope": _record(RopeSpec, rope)})
        except TypeError as error:
            raise ModelError(f"the package's spec cannot be read ({error}); export the model again") from None


def _record(kind: type[Record], values: Mapping[str, Any]) -> Record:
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise ModelError(f"the package's spec has unknown keys {unknown}; export the model again")
    return kind(**values)


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _require(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise ModelError(f"the model's {name} is {value}; supported: {allowed}; use another model")
