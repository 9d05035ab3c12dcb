"""What the families share: metadata keys to a spec, tensor names to roles, and their checks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from ..blocks import is_readable
from ..rope import yarn_attention_factor
from ..sources import Source
from ..spec import ModelSpec, RopeSpec

# tensors that older converters wrote and that hold nothing the metadata does not say
IGNORED_SUFFIXES = ("attn_rot_embd", "attn_rot_embd.weight", "attn.rope.freqs")
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class WeightRole:
    """Where one weight of the decoder comes from.

    ``role`` is the name in the package: ``embedding``, ``output``, ``output_norm`` and, with l counted from
    0, ``layers.{l}.`` + ``attention_norm | query | key | value | attention_output | feed_forward_norm | gate
    | up | down``, each perhaps with ``.bias``. ``shape`` is [out, in] for a matrix, [n] for a vector.
    ``interleaved_heads`` is not 0 when the rows of that many heads come in interleaved-RoPE order.
    """

    role: str
    tensor: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0

    def row_order(self) -> npt.NDArray[np.intp] | None:
        """Source row of each row in half-split order, or None when the order is right as it is."""
        if not self.interleaved_heads:
            return None
        rows = np.arange(self.shape[0]).reshape(self.interleaved_heads, -1, 2)
        order: npt.NDArray[np.intp] = rows.swapaxes(1, 2).reshape(-1)
        return order


@dataclass(frozen=True)
class DecoderModel:
    """A spec and the roles of all its weights, in the order of their use."""

    spec: ModelSpec
    weights: tuple[WeightRole, ...]


class Keys:
    """Typed access to the metadata keys of one architecture."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._prefix = source.architecture

    def get(self, key: str) -> Any:
        return self._source.metadata.get(f"{self._prefix}.{key}")

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

    def _wrong(self, key: str, value: object, wanted: str) -> ModelError:
        shown = "missing" if value is None else repr(value)[:60]
        return ModelError(
            f"{self._source.path}: {self._prefix}.{key} is {shown}, not {wanted}; use another file"
        )


def read_decoder(source: Source, *, tensor_biases: tuple[str, ...]) -> DecoderModel:
    """A plain pre-norm decoder with grouped-query attention and a SwiGLU feed-forward.

    Args:
        tensor_biases: which of the layer's linears (as GGUF names them) may have a bias.
    """
    spec = _read_spec(source)
    if source.interleaved_rope and spec.rope.dims != spec.head_size:
        raise ModelError(
            f"{source.path}: rotary positions on {spec.rope.dims} of {spec.head_size} dimensions are not "
            f"supported for {spec.architecture}; use another model"
        )
    weights = tuple(_roles(source, spec, tensor_biases))
    _check_shapes(source, weights)
    return DecoderModel(spec, weights)


def _read_spec(source: Source) -> ModelSpec:
    keys = Keys(source)
    if keys.integer("expert_count", 0):
        raise ModelError(
            f"{source.path} is a mixture of experts, which is not supported yet; use a dense model"
        )
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{source.path} has no tensor token_embd.weight; it is not a complete model")
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    if heads < 1 or hidden < 1:
        raise ModelError(f"{source.path}: {heads} heads over {hidden} dimensions cannot be; use another file")
    head_size = keys.integer("attention.key_length", hidden // heads)
    if keys.integer("attention.value_length", head_size) != head_size:
        raise ModelError(
            f"{source.path}: keys and values of different sizes are not supported; use another model"
        )
    name = source.metadata.get("general.name")
    return ModelSpec(
        architecture=source.architecture,
        name=name if isinstance(name, str) and name else source.name,
        layers=keys.integer("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=keys.integer("attention.head_count_kv", heads),
        head_size=head_size,
        feed_forward=keys.integer("feed_forward_length"),
        vocab=embedding.rows,
        context_length=keys.integer("context_length"),
        norm_epsilon=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_read_rope(source, keys, head_size),
        tied_embeddings="output.weight" not in source.tensors,
        attention_scale=1.0 / math.sqrt(head_size) if head_size > 0 else 0.0,
    )


def _read_rope(source: Source, keys: Keys, head_size: int) -> RopeSpec:
    scaling = keys.get("rope.scaling.type") or "none"
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    if scaling == "none" and keys.get("rope.scale_linear") is not None and factor != 1.0:
        scaling = "linear"
    if scaling not in ("none", "linear", "yarn"):
        raise ModelError(f"{source.path}: RoPE scaling {scaling!r} is not supported (none, linear, yarn)")
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if scaling == "yarn":
        attention_factor *= yarn_attention_factor(factor)
    factors: tuple[float, ...] = ()
    if ROPE_FACTORS in source.tensors:
        tensor = source.tensors[ROPE_FACTORS]
        if tensor.type_name != "F32" or tensor.columns > head_size:
            raise ModelError(
                f"{source.path}: {ROPE_FACTORS} is {tensor.type_name} {list(tensor.shape)}, not float32"
            )
        factors = tuple(tensor.read_rows(0, tensor.rows).view(np.float32).reshape(-1).tolist())
    return RopeSpec(
        base=keys.number("rope.freq_base", 10000.0),
        dims=keys.integer("rope.dimension_count", head_size),
        scaling=scaling,
        factor=factor,
        original_context=keys.integer("rope.scaling.original_context_length", keys.integer("context_length")),
        attention_factor=attention_factor,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        frequency_factors=factors,
    )


def _roles(source: Source, spec: ModelSpec, biases: tuple[str, ...]) -> Iterator[WeightRole]:
    interleaved = source.interleaved_rope  # such rows are put back into half-split order
    hidden, inner = spec.hidden, spec.feed_forward
    queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    # our name, GGUF's name, shape, heads whose rows are interleaved
    linears = (
        ("query", "attn_q", (queries, hidden), spec.heads if interleaved else 0),
        ("key", "attn_k", (keys, hidden), spec.kv_heads if interleaved else 0),
        ("value", "attn_v", (keys, hidden), 0),
        ("attention_output", "attn_output", (hidden, queries), 0),
        ("gate", "ffn_gate", (inner, hidden), 0),
        ("up", "ffn_up", (inner, hidden), 0),
        ("down", "ffn_down", (hidden, inner), 0),
    )
    yield WeightRole("embedding", "token_embd.weight", (spec.vocab, hidden))
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}.", f"blk.{layer}."
        yield WeightRole(ours + "attention_norm", theirs + "attn_norm.weight", (hidden,))
        yield WeightRole(ours + "feed_forward_norm", theirs + "ffn_norm.weight", (hidden,))
        for role, name, shape, interleaved_heads in linears:
            yield WeightRole(ours + role, f"{theirs}{name}.weight", shape, interleaved_heads)
            if name in biases and f"{theirs}{name}.bias" in source.tensors:
                yield WeightRole(f"{ours}{role}.bias", f"{theirs}{name}.bias", shape[:1], interleaved_heads)
    yield WeightRole("output_norm", "output_norm.weight", (hidden,))
    if not spec.tied_embeddings:
        yield WeightRole("output", "output.weight", (spec.vocab, hidden))


def _check_shapes(source: Source, weights: tuple[WeightRole, ...]) -> None:
    """Every role has its tensor in the right shape, and no tensor is left that we would silently not compute
    with.
    """
    for weight in weights:
        tensor = source.tensors.get(weight.tensor)
        if tensor is None:
            raise ModelError(f"{source.path} has no tensor {weight.tensor}; it is not a complete model")
        if tensor.shape != weight.shape:
            raise ModelError(
                f"{source.path}: tensor {weight.tensor} has the shape {list(tensor.shape)}, its metadata "
                f"says {list(weight.shape)}; use another file"
            )
        if not is_readable(tensor.type_name):
            raise ModelError(
                f"{source.path}: tensor {weight.tensor} has the unreadable type {tensor.type_name}; "
                "use a file in another quantization"
            )
    used = {weight.tensor for weight in weights} | {ROPE_FACTORS}
    surplus = [name for name in source.tensors if name not in used and not name.endswith(IGNORED_SUFFIXES)]
    if surplus:
        shown = ", ".join(surplus[:3]) + (f" and {len(surplus) - 3} more" if len(surplus) > 3 else "")
        raise ModelError(f"{source.path} has tensors that {source.architecture} does not use here: {shown}")
