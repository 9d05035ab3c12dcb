"""The native flavour's graph: the decoder as ONNX, linears and attention in our own operator domain.

Inputs: ``input_ids`` and ``positions`` int64 [T], ``cache`` int64 [1] (the handle of the native KV cache).
Output: ``logits`` float32 [1, vocab] of the last position. Matrices stay in the external weight file, where
the operators read them in place; the small vectors are inside the graph. Any T works: the graph has no other
state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .blocks import Floats
from .rope import rope_frequencies
from .spec import ACTIVATIONS, ExpertSpec, ModelSpec
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

    def packed(self, role: str, scale: float = 1.0, prefix: str = "") -> tuple[str, dict[str, int | float]]:
        """The initializer of a packed matrix (shared when used twice) and the attributes that describe it.

        A factor on the result costs nothing: the operators multiply by a number anyway.
        """
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
        attributes = {
            "N": record.rows, "K": record.columns, "bits": record.bits, "block": record.block,
            "has_min": int(record.has_min), "multiplier": float(record.multiplier) * scale,
        }  # fmt: skip
        return role, {prefix + name: value for name, value in attributes.items()}

    def embedding(self, ids: str, output: str) -> str:
        packed, attributes = self.packed("embedding", self.spec.embedding_multiplier)
        return self.node("QuantizedEmbedding", [ids, packed], [output], DOMAIN, **attributes)

    def linear(self, x: str, role: str, output: str, scale: float = 1.0) -> str:
        """x times the transpose of the matrix, plus the bias if there is one, all of it times ``scale``."""
        packed, attributes = self.packed(role, scale)
        inputs, bias = [x, packed], role + ".bias"
        if bias in self.vectors:
            inputs.append(self.constant(bias, self.vectors[bias] * np.float32(scale)))
        return self.node("QuantizedLinear", inputs, [output], DOMAIN, **attributes)

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

    def head_norm(self, x: str, role: str, output: str, heads: int) -> str:
        """Each head's part of x [T, heads x head_size] normalized by itself."""
        size = self.spec.head_size
        by_head = self.constant("shape.by_head", np.array([-1, size], np.int64))
        joined = self.constant(f"shape.{heads}_heads", np.array([-1, heads * size], np.int64))
        split = self.node("Reshape", [x, by_head], [output + ".split"])
        return self.node("Reshape", [self.norm(split, role, output + ".normed"), joined], [output])

    def projection(self, x: str, layer: int, name: str, heads: int) -> str:
        """Queries or keys of a layer, before RoPE: [T, heads x head_size]."""
        role, kind = f"layers.{layer}.{name}", self.spec.query_key_norm
        found = self.linear(x, role, role + ".out")
        if kind == "none":
            return found
        if kind == "whole":
            return self.norm(found, role + "_norm", role + "_norm.out")
        return self.head_norm(found, role + "_norm", role + "_norm.out", heads)

    def attention(self, normed: str, layer: int) -> str:
        """Query, key and value projections and the attention over the cache: [T, heads x head_size]."""
        spec, at = self.spec, f"layers.{layer}."
        inputs = [
            self.projection(normed, layer, "query", spec.heads),
            self.projection(normed, layer, "key", spec.kv_heads),
            self.linear(normed, at + "value", at + "value.out"),
        ]
        rope = spec.layer_rope(layer)
        name = "none" if rope is None else "window" if rope is spec.window_rope else "all"
        turns = np.zeros(0, np.float32) if rope is None else rope_frequencies(rope)
        return self.node(
            "CachedAttention",
            [*inputs, "positions", "cache", self.constant(f"rope_frequencies.{name}", turns)],
            [at + "attention.out"], DOMAIN,
            layer=layer, heads=spec.heads, kv_heads=spec.kv_heads, head_size=spec.head_size,
            scale=float(spec.attention_scale), softcap=float(spec.attention_softcap),
            window=spec.attention_windows[layer], rope_dims=rope.dims if rope else 0,
            rope_attention_factor=float(rope.attention_factor) if rope else 1.0,
        )  # fmt: skip

    def feed_forward(self, normed: str, layer: int) -> str:
        at, spec = f"layers.{layer}.", self.spec
        activation = ACTIVATIONS.index(spec.activation)
        if spec.experts is not None:
            return self.experts(normed, at, spec.experts, activation)
        gate, up = (
            self.linear(normed, at + "gate", at + "gate.out"),
            self.linear(normed, at + "up", at + "up.out"),
        )
        inner = self.node("GatedUnit", [gate, up], [at + "gated.out"], DOMAIN, activation=activation)
        return self.linear(inner, at + "down", at + "down.out", spec.residual_multiplier)

    def experts(self, normed: str, at: str, experts: ExpertSpec, activation: int) -> str:
        inputs = [normed, self.linear(normed, at + "router", at + "router.out")]
        attributes: dict[str, int | float] = {}
        for name in ("gate", "up", "down"):
            scale = self.spec.residual_multiplier if name == "down" else 1.0
            packed, described = self.packed(f"{at}expert_{name}", scale, name + "_")
            inputs.append(packed)
            attributes |= described
        return self.node(
            "MixtureOfExperts", inputs, [at + "experts.out"], DOMAIN, experts=experts.count, used=experts.used,
            normalized=int(experts.normalized), activation=activation, **attributes,
        )  # fmt: skip

    def enter(self, residual: str, norm_role: str) -> str:
        """What a sublayer reads."""
        if self.spec.norm_places == "post":
            return residual
        return self.norm(residual, norm_role, norm_role + ".out")

    def join(self, added: str, residual: str, post_role: str, following: str, total: str) -> tuple[str, str]:
        """Adds a sublayer's result to the residual; what the next sublayer reads, and the new residual.

        ``following`` is the role of the next norm, ``total`` names the sum.
        """
        places = self.spec.norm_places
        if places != "pre":
            added = self.norm(added, post_role, post_role + ".out")
        if places == "post" and following != "output_norm":
            return (self.node("Add", [added, residual], [total]),) * 2
        unused = following == "output_norm"
        return self.add_norm(added, residual, following, following + ".out", "" if unused else total), total

    def logits(self, normed: str) -> None:
        """The vocabulary projection of the last position, into the graph's output."""
        spec = self.spec
        role, cap = "embedding" if spec.tied_embeddings else "output", spec.logits_softcap
        if not cap:
            self.linear(normed, role, "logits", spec.logits_multiplier)
            return
        raw = self.linear(normed, role, "logits.raw", spec.logits_multiplier / cap)
        bent = self.node("Tanh", [raw], ["logits.bent"])
        self.node("Mul", [bent, self.constant("logits.cap", np.array(cap, np.float32))], ["logits"])


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
    normed = graph.enter(residual, "layers.0.attention_norm")
    for layer in range(spec.layers):
        at = f"layers.{layer}."
        attended = graph.attention(normed, layer)
        last = layer == spec.layers - 1
        if last:
            # keys and values of all positions are in the cache now: the rest concerns the last position only
            attended = graph.last_row(attended, at + "attention.last")
            residual = graph.last_row(residual, at + "residual.last")
        projected = graph.linear(
            attended, at + "attention_output", at + "attention_output.out", spec.residual_multiplier
        )
        normed, residual = graph.join(
            projected, residual, at + "attention_post_norm", at + "feed_forward_norm", at + "middle"
        )
        following = "output_norm" if last else f"layers.{layer + 1}.attention_norm"
        normed, residual = graph.join(
            graph.feed_forward(normed, layer), residual, at + "feed_forward_post_norm", following,
            f"layers.{layer + 1}.residual",
        )  # fmt: skip
    graph.logits(normed)
    return _model(graph, spec)


def stretched_graph(model_file: Path, spec: ModelSpec) -> bytes:
    """The graph in ``model_file`` with the rotary positions of ``spec`` in the layers that see everything."""
    model = onnx.load(str(model_file), load_external_data=False)
    name = "rope_frequencies.all"
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(rope_frequencies(spec.rope), name))
    for node in model.graph.node:
        if node.op_type == "CachedAttention" and name in node.input:
            for attribute in node.attribute:
                if attribute.name == "rope_attention_factor":
                    attribute.f = spec.rope.attention_factor
    return model.SerializeToString()


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
