"""What the families share: metadata keys to a spec, tensor names to roles, and their checks.

Keys and tensor names are GGUF's; sources of other kinds present themselves in them.
"""

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
from ..spec import ExpertSpec, ModelSpec, RopeSpec

# tensors that older converters wrote and that hold nothing the metadata does not say
IGNORED_SUFFIXES = ("attn_rot_embd", "attn_rot_embd.weight", "attn.rope.freqs")
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
QUERY_KEY_VALUE = ("attn_q", "attn_k", "attn_v")
ALL_LINEARS = (*QUERY_KEY_VALUE, "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class WeightRole:
    """Where one weight of the decoder comes from.

    ``role`` is the name in the package: ``embedding``, ``output``, ``output_norm`` and, with l counted from
    0, ``layers.{l}.`` + ``query | key | value | attention_output | gate | up | down`` (each perhaps with
    ``.bias``; with experts ``router | expert_gate | expert_up | expert_down``) or ``attention_norm |
    attention_post_norm | feed_forward_norm | feed_forward_post_norm | query_norm | key_norm``. ``shape`` is
    [out, in] for a matrix, [n] for a vector; experts are stacked in ``out``. ``interleaved_heads`` is not 0 when
    the rows of that many heads come in interleaved-RoPE order.

    ``tensor_shape`` is that of the whole tensor where it is another: the weight is its rows from ``first_row`` on.
    """

    role: str
    tensor: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0
    tensor_shape: tuple[int, ...] = ()
    first_row: int = 0

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


def decoder(
    source: Source, spec: ModelSpec, *, biases: tuple[str, ...] = (), fused: bool = False
) -> DecoderModel:
    """The model of ``spec`` with the weights of ``source``, each of them checked.

    Args:
        biases: which of the layer's linears (as GGUF names them) may have a bias.
        fused: query, key and value are one tensor, and so are gate and up.
    """
    interleaved = source.interleaved_rope
    if interleaved and spec.rope.dims != spec.head_size:
        raise ModelError(
            f"{source.path}: rotary positions on {spec.rope.dims} of {spec.head_size} dimensions are not "
            f"supported for {spec.architecture}; use another model"
        )
    if spec.experts is None and Keys(source).integer("expert_count", 0):
        raise ModelError(
            f"{source.path} is a mixture of experts ({spec.architecture}.expert_count), which "
            "is supported for qwen3moe only; use a dense model"
        )
    if not any(spec.attention_windows) and any(Keys(source).windows(spec.layers)):
        raise ModelError(
            f"{source.path} has a sliding window ({spec.architecture}.attention.sliding_window), which is not "
            f"supported for {spec.architecture}; use another model"
        )
    layout = _Layout(source, spec, biases, fused)
    weights = tuple(layout.roles())
    _check_shapes(source, weights)
    return DecoderModel(spec, weights)


def read_spec(source: Source) -> ModelSpec:
    """What the metadata say in the keys that all families share; a family replaces what it has otherwise."""
    keys = Keys(source)
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
        name=name if isinstance(name, str) and name else source.path.stem,
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
        attention_scale=keys.number("attention.scale", 0.0) or 1.0 / math.sqrt(max(head_size, 1)),
        attention_softcap=keys.number("attn_logit_softcapping", 0.0),
        logits_softcap=keys.number("final_logit_softcapping", 0.0),
    )


def read_experts(source: Source) -> ExpertSpec:
    """The experts that the metadata describe; GGUF's older files mean normalized weights when they do not say."""
    keys = Keys(source)
    return ExpertSpec(
        count=keys.integer("expert_count"),
        used=keys.integer("expert_used_count"),
        width=keys.integer("expert_feed_forward_length"),
        normalized=bool(keys.integer("expert_weights_norm", 1)),
    )


def _read_rope(source: Source, keys: Keys, head_size: int) -> RopeSpec:
    scaling = keys.get("rope.scaling.type") or "none"
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    if scaling == "none" and keys.get("rope.scale_linear") is not None and factor != 1.0:
        scaling = "linear"
    if scaling not in ("none", "linear", "yarn", "longrope"):
        raise ModelError(
            f"{source.path}: RoPE scaling {scaling!r} is not supported (none, linear, yarn, longrope)"
        )
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if scaling == "yarn":
        attention_factor *= yarn_attention_factor(factor)
    context = keys.integer("context_length")
    original = keys.integer("rope.scaling.original_context_length", context)
    # LongRoPE has factors for texts within the original context, too: a reader of long documents has one cache
    # for all lengths and takes the long ones
    factors = _read_factors(source, (LONG_FACTORS if context > original else SHORT_FACTORS, ROPE_FACTORS), head_size)
    if scaling == "longrope" and not factors:
        raise ModelError(f"{source.path} has no tensor {LONG_FACTORS}, which its RoPE scaling needs; use another file")
    return RopeSpec(
        base=keys.number("rope.freq_base", 10000.0),
        dims=keys.integer("rope.dimension_count", head_size),
        scaling="none" if scaling == "longrope" else scaling,
        factor=factor,
        original_context=original,
        attention_factor=attention_factor,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        frequency_factors=factors,
    )


def _read_factors(source: Source, names: tuple[str, ...], head_size: int) -> tuple[float, ...]:
    """The frequency factors in the first tensor of these names that there is."""
    for name in names:
        if name in source.tensors:
            tensor = source.tensors[name]
            if tensor.type_name != "F32" or tensor.columns > head_size:
                raise ModelError(f"{source.path}: {name} is {tensor.type_name} {list(tensor.shape)}, not float32")
            return tuple(tensor.read_rows(0, tensor.rows).view(np.float32).reshape(-1).tolist())
    return ()


class _Layout:
    """Which tensors hold the weights of a decoder."""

    def __init__(self, source: Source, spec: ModelSpec, biases: tuple[str, ...], fused: bool) -> None:
        self._source = source
        self._spec = spec
        self._biases = biases
        self._fused = fused

    def roles(self) -> Iterator[WeightRole]:
        spec = self._spec
        yield WeightRole("embedding", "token_embd.weight", (spec.vocab, spec.hidden))
        for layer in range(spec.layers):
            ours, theirs = f"layers.{layer}.", f"blk.{layer}."
            for role, name, size in self._norms():
                yield WeightRole(ours + role, f"{theirs}{name}.weight", (size,))
            yield from self._attention(ours, theirs)
            yield from self._experts(ours, theirs) if spec.experts else self._feed_forward(ours, theirs)
        yield WeightRole("output_norm", "output_norm.weight", (spec.hidden,))
        if not spec.tied_embeddings:
            yield WeightRole("output", "output.weight", (spec.vocab, spec.hidden))

    def _norms(self) -> Iterator[tuple[str, str, int]]:
        """(our name, GGUF's name, size) of a layer's norms."""
        spec = self._spec
        if spec.norm_places != "post":
            yield "attention_norm", "attn_norm", spec.hidden
            yield "feed_forward_norm", "ffn_norm", spec.hidden
        if spec.norm_places != "pre":
            yield "attention_post_norm", "post_attention_norm", spec.hidden
            yield "feed_forward_post_norm", "post_ffw_norm", spec.hidden
        if spec.query_key_norm != "none":
            heads, kv_heads = (spec.heads, spec.kv_heads) if spec.query_key_norm == "whole" else (1, 1)
            yield "query_norm", "attn_q_norm", heads * spec.head_size
            yield "key_norm", "attn_k_norm", kv_heads * spec.head_size

    def _attention(self, ours: str, theirs: str) -> Iterator[WeightRole]:
        spec, interleaved = self._spec, self._source.interleaved_rope
        queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        if self._fused:
            whole, sizes = f"{theirs}attn_qkv.weight", {"query": queries, "key": keys, "value": keys}
            yield from _slices(ours, whole, sizes, spec.hidden)
        else:
            for role, name, rows, heads in (
                ("query", "attn_q", queries, spec.heads),
                ("key", "attn_k", keys, spec.kv_heads),
                ("value", "attn_v", keys, 0),
            ):
                yield from self._linear(
                    ours + role, theirs, name, (rows, spec.hidden), heads if interleaved else 0
                )
        yield from self._linear(ours + "attention_output", theirs, "attn_output", (spec.hidden, queries))

    def _feed_forward(self, ours: str, theirs: str) -> Iterator[WeightRole]:
        hidden, inner = self._spec.hidden, self._spec.feed_forward
        if self._fused:
            yield from _slices(ours, f"{theirs}ffn_up.weight", {"gate": inner, "up": inner}, hidden)
        else:
            yield from self._linear(ours + "gate", theirs, "ffn_gate", (inner, hidden))
            yield from self._linear(ours + "up", theirs, "ffn_up", (inner, hidden))
        yield from self._linear(ours + "down", theirs, "ffn_down", (hidden, inner))

    def _experts(self, ours: str, theirs: str) -> Iterator[WeightRole]:
        hidden, experts = self._spec.hidden, self._spec.experts
        assert experts is not None
        yield WeightRole(ours + "router", theirs + "ffn_gate_inp.weight", (experts.count, hidden))
        for role, name, rows, columns in (
            ("expert_gate", "ffn_gate_exps", experts.width, hidden),
            ("expert_up", "ffn_up_exps", experts.width, hidden),
            ("expert_down", "ffn_down_exps", hidden, experts.width),
        ):
            stacked = (experts.count * rows, columns)
            whole = (experts.count, rows, columns)
            yield WeightRole(ours + role, f"{theirs}{name}.weight", stacked, tensor_shape=whole)

    def _linear(
        self, role: str, theirs: str, name: str, shape: tuple[int, int], interleaved_heads: int = 0
    ) -> Iterator[WeightRole]:
        yield WeightRole(role, f"{theirs}{name}.weight", shape, interleaved_heads)
        bias = f"{theirs}{name}.bias"
        if name in self._biases and bias in self._source.tensors:
            yield WeightRole(role + ".bias", bias, shape[:1], interleaved_heads)


def _slices(ours: str, tensor: str, sizes: dict[str, int], columns: int) -> Iterator[WeightRole]:
    """The roles that lie one after the other in the rows of one tensor."""
    whole, first = (sum(sizes.values()), columns), 0
    for role, rows in sizes.items():
        yield WeightRole(ours + role, tensor, (rows, columns), tensor_shape=whole, first_row=first)
        first += rows


def _check_shapes(source: Source, weights: tuple[WeightRole, ...]) -> None:
    """Every role has its tensor in the right shape, and no tensor is left that we would silently not compute
    with.
    """
    for weight in weights:
        tensor = source.tensors.get(weight.tensor)
        if tensor is None:
            raise ModelError(f"{source.path} has no tensor {weight.tensor}; it is not a complete model")
        wanted = weight.tensor_shape or weight.shape
        if tensor.shape != wanted:
            raise ModelError(
                f"{source.path}: tensor {weight.tensor} has the shape {list(tensor.shape)}, its metadata "
                f"says {list(wanted)}; use another file"
            )
        if not is_readable(tensor.type_name):
            raise ModelError(
                f"{source.path}: tensor {weight.tensor} has the unreadable type {tensor.type_name}; "
                "use a file in another quantization"
            )
    used = {weight.tensor for weight in weights} | {ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS}
    surplus = [name for name in source.tensors if name not in used and not name.endswith(IGNORED_SUFFIXES)]
    if surplus:
        shown = ", ".join(surplus[:3]) + (f" and {len(surplus) - 3} more" if len(surplus) > 3 else "")
        raise ModelError(f"{source.path} has tensors that {source.architecture} does not use here: {shown}")
