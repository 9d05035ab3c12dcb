"""The native flavour's graph: the decoder as ONNX, linears and attention in our own operator domain.

Inputs: ``input_ids`` and ``positions`` int64 [T], ``cache`` int64 [1] (the handle of the native KV cache).
Output: ``logits`` float32 [1, vocab] of the last position. Matrices stay in the external weight file, where
the operators read them in place; the small vectors are inside the graph. Any T works: the graph has no other
state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .blocks import Floats
from .rope import rope_frequencies
from .spec import ModelSpec
from .weights import MatrixRecord

OPSET, IR_VERSION = 21, 10
DOMAIN, DOMAIN_VERSION = "satchel", 1
MICROSOFT = "com.microsoft"
LAST = np.iinfo(np.int64).max


class _Graph:
    """Collects nodes and initializers; every method adds one operation and returns the name of its output."""

    def __init__(
        self,
        spec: ModelSpec,
        matrices: Mapping[str, MatrixRecord],
        vectors: Mapping[str, Floats],
        data_file: str,
    ) -> None:
        self.spec = spec
        self.matrices = matrices
        self.vectors = vectors
        self.data_file = data_file
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def node(
        self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> str:
        name = outputs[-1] + "/" + kind
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(values, name)
        return name

    def vector(self, role: str) -> str:
        return self.constant(role, self.vectors[role])

    def packed(self, role: str) -> tuple[str, dict[str, int | float]]:
        """The initializer of a packed matrix (shared when used twice) and the attributes that describe it."""
        record = self.matrices[role]
        if role not in self.initializers:
            tensor = TensorProto(name=role, data_type=TensorProto.UINT8, dims=[record.bytes])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", self.data_file),
                ("offset", record.offset),
                ("length", record.bytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
            self.initializers[role] = tensor
        return role, {
            "N": record.rows, "K": record.columns, "bits": record.bits, "block": record.block,
            "has_min": int(record.has_min), "multiplier": float(record.multiplier),
        }  # fmt: skip

    def embedding(self, ids: str, output: str) -> str:
        packed, attributes = self.packed("embedding")
        return self.node("QuantizedEmbedding", [ids, packed], [output], DOMAIN, **attributes)

    def linear(self, x: str, role: str, output: str) -> str:
        packed, attributes = self.packed(role)
        bias = [self.vector(role + ".bias")] if role + ".bias" in self.vectors else []
        return self.node("QuantizedLinear", [x, packed, *bias], [output], DOMAIN, **attributes)

    def norm(self, x: str, role: str, output: str) -> str:
        return self.node(
            "SimplifiedLayerNormalization", [x, self.vector(role)], [output],
            axis=-1, epsilon=self.spec.norm_epsilon, stash_type=1,
        )  # fmt: skip

    def add_norm(self, x: str, skip: str, role: str, output: str, total: str = "") -> str:
        """norm(x + skip); the sum itself is the output named ``total``, if any."""
        outputs = [output, "", "", total] if total else [output]
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization", [x, skip, self.vector(role)], outputs,
                name=output + "/SkipSimplifiedLayerNormalization", domain=MICROSOFT,
                epsilon=self.spec.norm_epsilon,
            )
        )  # fmt: skip
        return output

    def last_row(self, x: str, output: str) -> str:
        bounds = [
            self.constant("last_row.start", np.array([-1], np.int64)),
            self.constant("last_row.end", np.array([LAST], np.int64)),
            self.constant("last_row.axis", np.array([0], np.int64)),
        ]
        return self.node("Slice", [x, *bounds], [output])

    def attention(self, normed: str, layer: int) -> str:
        """Query, key and value projections and the attention over the cache: [T, heads x head_size]."""
        spec, at = self.spec, f"layers.{layer}."
        inputs = [self.linear(normed, at + role, at + role + ".out") for role in ("query", "key", "value")]
        frequencies = self.constant("rope_frequencies", rope_frequencies(spec.rope))
        return self.node(
            "CachedAttention", [*inputs, "positions", "cache", frequencies], [at + "attention.out"], DOMAIN,
            layer=layer, heads=spec.heads, kv_heads=spec.kv_heads, head_size=spec.head_size,
            scale=float(spec.attention_scale), softcap=float(spec.attention_softcap),
            window=spec.attention_window, rope_dims=spec.rope.dims,
            rope_attention_factor=float(spec.rope.attention_factor),
        )  # fmt: skip

    def feed_forward(self, normed: str, layer: int) -> str:
        at = f"layers.{layer}."
        gate, up = (
            self.linear(normed, at + "gate", at + "gate.out"),
            self.linear(normed, at + "up", at + "up.out"),
        )
        inner = self.node("SwiGLU", [gate, up], [at + "swiglu.out"], DOMAIN)
        return self.linear(inner, at + "down", at + "down.out")


def build_graph(
    spec: ModelSpec, matrices: Mapping[str, MatrixRecord], vectors: Mapping[str, Floats], data_file: str
) -> onnx.ModelProto:
    """The whole decoder.

    Args:
        matrices: packed matrices by role, with their places in the file named ``data_file``.
        vectors: norm weights and biases by role, float32 [n].
    """
    graph = _Graph(spec, matrices, vectors, data_file)
    residual = graph.embedding("input_ids", "embedding.out")
    normed = graph.norm(residual, "layers.0.attention_norm", "layers.0.attention_norm.out")
    for layer in range(spec.layers):
        at = f"layers.{layer}."
        attended = graph.attention(normed, layer)
        last = layer == spec.layers - 1
        if last:
            # keys and values of all positions are in the cache now: the rest concerns the last position only
            attended = graph.last_row(attended, at + "attention.last")
            residual = graph.last_row(residual, at + "residual.last")
        projected = graph.linear(attended, at + "attention_output", at + "attention_output.out")
        middle = at + "middle"
        normed = graph.add_norm(
            projected, residual, at + "feed_forward_norm", at + "feed_forward_norm.out", middle
        )
        down = graph.feed_forward(normed, layer)
        if last:
            normed = graph.add_norm(down, middle, "output_norm", "output_norm.out")
        else:
            residual, following = f"layers.{layer + 1}.residual", f"layers.{layer + 1}.attention_norm"
            normed = graph.add_norm(down, middle, following, following + ".out", residual)
    graph.linear(normed, "embedding" if spec.tied_embeddings else "output", "logits")
    return _model(graph, spec)


def _model(graph: _Graph, spec: ModelSpec) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["tokens"]),
        helper.make_tensor_value_info("positions", TensorProto.INT64, ["tokens"]),
        helper.make_tensor_value_info("cache", TensorProto.INT64, [1]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, spec.vocab])]
    body = helper.make_graph(graph.nodes, "decoder", inputs, outputs, list(graph.initializers.values()))
    domains = [("", OPSET), (MICROSOFT, 1), (DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains],
        producer_name="satchel",
    )  # fmt: skip
    model.ir_version = IR_VERSION
    return model
