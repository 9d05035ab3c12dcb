"""Which tensor of a source holds which weight of the decoder, and the checks that all is there and nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from ..blocks import is_readable
from ..sources import Source
from ..spec import ModelSpec

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


class Layout:
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


def check_shapes(source: Source, weights: tuple[WeightRole, ...]) -> None:
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
