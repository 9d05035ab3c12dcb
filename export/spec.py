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
ACTIVATIONS = ("silu", "gelu_tanh")
NORM_PLACES = ("pre", "post", "both")  # of each sublayer: its input, its output, or both
QUERY_KEY_NORMS = ("none", "head", "whole")  # each head of its own, or all heads of a projection together
HEAD_SIZE_STEP = 16  # the attention kernels take whole vectors of 16 floats
MAX_HEAD_SIZE = 256
COLUMN_STEP = 32  # the packed weights have blocks of 32 along the input
# upper limits of the sizes: far above any model, low enough that products of them stay in 64 bits
LARGEST = {
    "layers": 1024, "hidden": 1 << 17, "heads": 1024, "kv_heads": 1024, "head_size": MAX_HEAD_SIZE,
    "feed_forward": 1 << 20, "vocab": 1 << 22, "context_length": 1 << 31,
}  # fmt: skip
MOST_EXPERTS = 1024

Record = TypeVar("Record", "RopeSpec", "ExpertSpec", "ModelSpec")


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
class ExpertSpec:
    """Feed-forward blocks of which each token passes a few: the ``used`` ones that a router likes best."""

    count: int
    used: int
    width: int  # inner width of one expert
    normalized: bool  # whether the weights of the used ones add up to 1

    def __post_init__(self) -> None:
        _require(1 <= self.count <= MOST_EXPERTS, "number of experts", self.count, f"1 to {MOST_EXPERTS}")
        _require(1 <= self.used <= self.count, "number of experts used", self.used, f"1 to {self.count}")
        good = 1 <= self.width <= LARGEST["feed_forward"] and self.width % COLUMN_STEP == 0
        _require(good, "width of an expert", self.width, f"a multiple of {COLUMN_STEP}")


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: L layers, H query heads, KV key-value heads of size D, as in the legend of the docs.

    ``rope`` turns queries and keys of the layers that see everything, ``window_rope`` those of windowed layers
    (None: the same). ``attention_windows`` has one number per layer, 0 where the layer sees everything; empty
    means no windows. ``feed_forward`` is the inner width that a token passes: of a mixture of experts, that of
    all its used experts together.
    """

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
    attention_windows: tuple[int, ...] = ()  # [L], 0: none
    window_rope: RopeSpec | None = None
    unrotated_layers: tuple[int, ...] = ()  # those without RoPE
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what a sublayer adds
    logits_multiplier: float = 1.0
    logits_softcap: float = 0.0  # 0: none
    activation: str = "silu"
    norm_places: str = "pre"
    query_key_norm: str = "none"
    experts: ExpertSpec | None = None

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
        for name in ("attention_scale", "embedding_multiplier", "residual_multiplier", "logits_multiplier"):
            _require(_positive(getattr(self, name)), name, getattr(self, name), "positive")
        for name in ("attention_softcap", "logits_softcap"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        for name, known in (
            ("activation", ACTIVATIONS),
            ("norm_places", NORM_PLACES),
            ("query_key_norm", QUERY_KEY_NORMS),
        ):
            _require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(known)}")
        self._check_layers()

    def _check_layers(self) -> None:
        windows = self.attention_windows or (0,) * self.layers
        object.__setattr__(self, "attention_windows", windows)  # always one for each layer
        good = len(windows) == self.layers
        _require(good, "number of attention windows", len(windows), f"{self.layers}, one for each layer")
        for window in windows:
            _require(0 <= window < LARGEST["context_length"], "attention window", window, "0 or more")
        for layer in self.unrotated_layers:
            _require(0 <= layer < self.layers, "layer without RoPE", layer, f"0 to {self.layers - 1}")
        for rope in (self.rope, self.window_rope or self.rope):
            _require(rope.dims <= self.head_size, "RoPE dimensions", rope.dims, f"at most {self.head_size}")
        if self.experts is not None:
            inner = self.experts.used * self.experts.width
            _require(self.feed_forward == inner, "feed_forward", self.feed_forward, f"used experts' {inner}")

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers, in 16-bit floats."""
        return self.layers * self.kv_heads * self.head_size * 2 * 2

    def layer_rope(self, layer: int) -> RopeSpec | None:
        """The rotary positions of a layer; None for a layer that has none."""
        if layer in self.unrotated_layers:
            return None
        return (self.window_rope or self.rope) if self.attention_windows[layer] else self.rope

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, ready for ``json``."""
        return asdict(self, dict_factory=_plain)

    @classmethod
    def from_json(cls, value: Any) -> ModelSpec:
        """The inverse of ``to_json``.

        Raises:
            ModelError: a key is missing or unknown, or a value is out of range.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("rope"), Mapping):
            raise ModelError("the package's spec is not a record with a rope record; export the model again")
        parts = dict(value)
        try:
            for name in ("attention_windows", "unrotated_layers"):
                parts[name] = tuple(parts.get(name, ()))
            for name in ("rope", "window_rope"):
                if parts.get(name) is not None:
                    parts[name] = _record(RopeSpec, parts[name])
            if parts.get("experts") is not None:
                parts["experts"] = _record(ExpertSpec, parts["experts"])
            return _record(cls, parts)
        except (TypeError, ValueError) as error:
            raise ModelError(f"the package's spec cannot be read ({error}); export the model again") from None


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


def _record(kind: type[Record], values: Mapping[str, Any]) -> Record:
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise ModelError(f"the package's spec has unknown keys {unknown}; export the model again")
    if "frequency_factors" in values:
        values = {**values, "frequency_factors": tuple(values["frequency_factors"])}
    return kind(**values)


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _require(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise ModelError(f"the model's {name} is {value}; supported: {allowed}; use another model")
