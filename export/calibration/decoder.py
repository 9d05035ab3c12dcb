"""A package's decoder in torch, float32, for looking inside: what each layer's attention reads, and how it attends.

The weights are the package's own, dequantized when their layer runs (one layer of floats in memory at a time). All
dense architectures that a spec can describe. torch is of the extra ``calibrate``, and imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ... import kernels
from ...errors import ModelError, OptionError
from ..package import Package
from ..rope import rope_frequencies
from ..weights import MatrixRecord

Tensor = Any  # torch.Tensor, which only those have who installed the extra
Floats = npt.NDArray[np.float32]
ROW_BLOCK = 512  # queries whose attention weights are in memory at a time, for one head


def require_torch() -> Any:
    """The module ``torch``. Raises OptionError when it is not installed."""
    try:
        import torch
    except ImportError:
        raise OptionError('calibrating needs torch, which is not installed; pip install "satchel[calibrate]"') from None
    return torch


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch computes with so many threads in the body."""
    torch = require_torch()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class LayerActivations:
    """What a layer's attention works on, float32 tensors. T tokens, H query heads, K KV heads, D head size.

    ``inputs`` [T, hidden]: what the projections read (normalized, where the model does that). ``queries`` [T, H, D],
    ``keys`` and ``values`` [T, K, D]: before RoPE; ``turned_queries`` and ``turned_keys``: after it.
    ``output_weight`` [hidden, H x D]: the attention's output projection.
    """

    layer: int
    inputs: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    turned_queries: Tensor
    turned_keys: Tensor
    output_weight: Tensor


class Observer(Protocol):
    """Is shown every layer: its activations first, then the attention of each head, block of queries by block."""

    def enter(self, activations: LayerActivations, /) -> None: ...

    def attended(self, head: int, first: int, weights: Tensor, /) -> None:
        """``weights`` [R, last + 1]: of queries ``first`` ... ``last`` of a head, on the keys up to the last of them
        (zero where a key is unseen). Not to be changed."""


@dataclass(frozen=True)
class Gates:
    """A layer's attention between full and streaming: ``full`` [K] in 0 ... 1 is the share of full attention, the rest
    is attention to the first ``sinks`` tokens and the last ``window``, the query's own included.
    """

    full: Tensor
    sinks: int
    window: int


class _Nobody:
    def enter(self, activations: LayerActivations, /) -> None: ...
    def attended(self, head: int, first: int, weights: Tensor, /) -> None: ...


class Decoder:
    """Runs texts from their first position on; nothing is kept between runs.

    Raises:
        OptionError: torch is not installed.
        ModelError: the package has experts, or no weights of its own.
    """

    def __init__(self, package: Package) -> None:
        self._torch = require_torch()
        self.spec = package.spec
        if package.linked_file is not None or package.manifest.flavour != "native":
            raise ModelError(
                f"{package.folder} is of the {package.manifest.flavour} flavour; calibrate the model's native package"
            )
        if self.spec.experts is not None:
            raise ModelError(
                f"{package.folder} has a mixture of experts, which cannot be calibrated yet; use a dense model"
            )
        self._matrices = {record["role"]: MatrixRecord(**record) for record in package.manifest.matrices}
        self._data = np.memmap(package.data_file, np.uint8, mode="r")
        self._vectors = {name: self._torch.from_numpy(values) for name, values in _vectors(package).items()}

    def logits(self, ids: Sequence[int]) -> Floats:
        """float32 [vocab] after the last of ``ids``."""
        spec, torch = self.spec, self._torch
        with torch.inference_mode():
            last = self.normed(self.run(ids)[-1:])
            role, cap = "embedding" if spec.tied_embeddings else "output", spec.logits_softcap
            found = self._linear(last, role, spec.logits_multiplier)[0]
            row: Floats = (torch.tanh(found / cap) * cap if cap else found).numpy()
        return row

    def run(self, ids: Sequence[int], observer: Observer | None = None, *, whole: bool = True) -> Tensor:
        """The residual stream after the last layer, float32 [T, hidden]; ``observer`` is shown every layer.

        ``whole`` False ends with the attention of the last layer: all that an observer sees, and the result is of
        no use then.
        """
        last, watch = self.spec.layers - 1, observer or _Nobody()
        with self._torch.inference_mode():
            residual = self.embedded(ids)
            for layer in range(last):
                residual = self.layer(residual, layer, watch)
            if whole:
                return self.layer(residual, last, watch)
            return self._attention(self._before(residual, f"layers.{last}.attention"), last, watch, None)

    def embedded(self, ids: Sequence[int]) -> Tensor:
        """The residual stream before the first layer, float32 [T, hidden]."""
        return self._rows("embedding", np.asarray(ids, np.int64)) * self.spec.embedding_multiplier

    def layer(
        self, residual: Tensor, layer: int, observer: Observer | None = None, gates: Gates | None = None
    ) -> Tensor:
        """The residual stream [T, hidden] after a layer. Gradients reach ``residual`` and ``gates``."""
        spec, at = self.spec, f"layers.{layer}."
        attended = self._attention(self._before(residual, at + "attention"), layer, observer or _Nobody(), gates)
        added = self._linear(attended, at + "attention_output", spec.residual_multiplier)
        residual = residual + self._after(added, at + "attention")
        normed = self._before(residual, at + "feed_forward")
        inner = self._gated(self._linear(normed, at + "gate"), self._linear(normed, at + "up"))
        added = self._linear(inner, at + "down", spec.residual_multiplier)
        return residual + self._after(added, at + "feed_forward")

    def normed(self, residual: Tensor) -> Tensor:
        """What the vocabulary's projection reads of the residual stream [T, hidden] after the last layer."""
        return self._norm(residual, "output_norm")

    # --- Blocks, as `export/graph.py` has them --------------------------------------------------------------------

    def _rows(self, role: str, rows: npt.NDArray[np.int64]) -> Tensor:
        record = self._matrices[role]
        packed = np.ascontiguousarray(self._data[record.offset : record.offset + record.bytes])
        values = kernels.embed(
            rows, packed, record.rows, record.columns, record.bits, record.block, record.has_min, record.multiplier,
            record.split,
        )  # fmt: skip
        return self._torch.from_numpy(values)

    def _matrix(self, role: str) -> Tensor:
        """float32 [out, in]."""
        return self._rows(role, np.arange(self._matrices[role].rows, dtype=np.int64))

    def _linear(self, x: Tensor, role: str, scale: float = 1.0) -> Tensor:
        found = x @ self._matrix(role).T
        if scale != 1:
            found *= scale
        bias = self._vectors.get(role + ".bias")  # in the graph, it has the scale already
        return found if bias is None else found + bias

    def _norm(self, x: Tensor, role: str) -> Tensor:
        power = x.square().mean(dim=-1, keepdim=True) + self.spec.norm_epsilon
        return x * power.rsqrt() * self._vectors[role]

    def _before(self, residual: Tensor, sublayer: str) -> Tensor:
        return residual if self.spec.norm_places == "post" else self._norm(residual, sublayer + "_norm")

    def _after(self, added: Tensor, sublayer: str) -> Tensor:
        return added if self.spec.norm_places == "pre" else self._norm(added, sublayer + "_post_norm")

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        bend = self._torch.nn.functional
        return (bend.silu(gate) if self.spec.activation == "silu" else bend.gelu(gate, approximate="tanh")) * up

    def _heads(self, x: Tensor, layer: int, name: str, heads: int) -> Tensor:
        """Queries or keys before RoPE [T, heads, D]."""
        role, kind = f"layers.{layer}.{name}", self.spec.query_key_norm
        found = self._linear(x, role)
        if kind == "whole":
            found = self._norm(found, role + "_norm")
        found = found.view(len(x), heads, -1)
        return self._norm(found, role + "_norm") if kind == "head" else found

    def _rotated(self, x: Tensor, layer: int) -> Tensor:
        torch, rope = self._torch, self.spec.layer_rope(layer)
        if rope is None:
            return x
        half = rope.dims // 2
        place = torch.arange(len(x), dtype=torch.float64)[:, None, None]
        angles = place * torch.from_numpy(rope_frequencies(rope)).double()
        cosine, sine = (part.float() * rope.attention_factor for part in (angles.cos(), angles.sin()))
        first, second = x[..., :half], x[..., half : 2 * half]
        turned = (first * cosine - second * sine, second * cosine + first * sine, x[..., 2 * half :])
        return torch.cat(turned, dim=-1)

    def _attention(self, x: Tensor, layer: int, watch: Observer, gates: Gates | None) -> Tensor:
        """[T, H x D], before the output projection."""
        spec, at = self.spec, f"layers.{layer}."
        queries = self._heads(x, layer, "query", spec.heads)
        keys = self._heads(x, layer, "key", spec.kv_heads)
        values = self._linear(x, at + "value").view(len(x), spec.kv_heads, -1)
        turned = self._rotated(queries, layer), self._rotated(keys, layer)
        weight = self._matrix(at + "attention_output")
        watch.enter(LayerActivations(layer, x, queries, keys, values, *turned, weight))
        out = self._torch.empty_like(queries)
        for head in range(spec.heads):
            group = head // (spec.heads // spec.kv_heads)
            for first in range(0, len(x), ROW_BLOCK):
                end = min(first + ROW_BLOCK, len(x))
                weights = self._weights(turned[0][first:end, head], turned[1][:end, group], layer, gates, group)
                watch.attended(head, first, weights)
                out[first:end, head] = weights @ values[:end, group]
        return out.view(len(x), -1)

    def _weights(self, queries: Tensor, keys: Tensor, layer: int, gates: Gates | None, group: int) -> Tensor:
        """Softmax weights [R, S] of the last R of S tokens on all of them, of KV head ``group``."""
        spec, torch = self.spec, self._torch
        logits = queries @ keys.T * spec.attention_scale
        if spec.attention_softcap:
            logits = torch.tanh(logits / spec.attention_softcap) * spec.attention_softcap
        place = torch.arange(len(keys))
        ahead = place - place[-len(queries) :, None]
        unseen = ahead > 0
        if window := spec.attention_windows[layer]:
            unseen = unseen | (ahead <= -window)
        logits = logits.masked_fill_(unseen, float("-inf"))
        whole = logits.softmax(dim=-1)
        if gates is None:
            return whole
        between = (place >= gates.sinks) & (ahead <= -gates.window)
        streaming = logits.masked_fill(between, float("-inf")).softmax(dim=-1)
        return gates.full[group] * whole + (1 - gates.full[group]) * streaming


def _vectors(package: Package) -> dict[str, Floats]:
    """Norm weights and biases by role, as the graph has them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(package.model_file), load_external_data=False).graph
    return {
        tensor.name: np.array(numpy_helper.to_array(tensor))
        for tensor in graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.data_type == onnx.TensorProto.FLOAT
    }
