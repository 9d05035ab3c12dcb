"""A package's graph with what a run wants of it: stretched positions, and heads that say what each pair will be worth.

The package stays as it is: weights are still read from its file, which the session must be told the folder of.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper, numpy_helper

from .calibration.files import Calibration
from .calibration.retention import (
    BIAS,
    INNER,
    INNER_BIAS,
    KEY,
    KEY_BIAS,
    KVZAP,
    LOCRET,
    MIXED,
    NOBODY,
    OUTER,
    OUTER_BIAS,
    QUERY,
    QUERY_BIAS,
    VALUE,
    VALUE_BIAS,
    WEIGHT,
)
from .package import Package
from .rope import rope_frequencies
from .spec import ModelSpec

ATTENTION = "CachedAttention"
OTHERS = "retention.others"  # float32 [tokens, tokens]: 0 where a token meets itself, else 1


def fitted_graph(package: Package, heads: Calibration | None = None) -> bytes:
    """The graph of a native package, serialized, with the rotary positions of ``package.spec`` in the layers that see
    everything. ``heads`` become the last input of each attention: ``retention`` float32 [tokens, KV heads].
    """
    model = onnx.load(str(package.model_file), load_external_data=False)
    if package.yarn_factor > 1:
        _stretch(model.graph, package.spec)
    if heads is not None:
        _add_retention(model.graph, heads)
    content: bytes = model.SerializeToString()
    return content


def _stretch(graph: Any, spec: ModelSpec) -> None:
    name = "rope_frequencies.all"
    for tensor in graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(rope_frequencies(spec.rope), name))
    for node in graph.node:
        if node.op_type == ATTENTION and name in node.input:
            for attribute in node.attribute:
                if attribute.name == "rope_attention_factor":
                    attribute.f = spec.rope.attention_factor


def _add_retention(graph: Any, heads: Calibration) -> None:
    """The heads of each layer, before its attention."""
    producers = {output: node for node in graph.node for output in node.output}
    nodes = [] if heads.method in (KVZAP, LOCRET) else _others()
    for node in graph.node:
        if node.op_type == ATTENTION:
            layer = next(attribute.i for attribute in node.attribute if attribute.name == "layer")
            at = f"layers.{layer}.retention"
            own = [name for name in heads.tensors if name.startswith(at + ".")]
            graph.initializer.extend(numpy_helper.from_array(heads.tensors[name], name) for name in own)
            if heads.method == KVZAP:  # a linear map of what the value projection reads
                nodes.append(_linear(producers[node.input[2]].input[0], WEIGHT, BIAS, layer, at))
            elif heads.method == LOCRET:
                nodes += _network(list(node.input[:3]), layer, at)
            else:
                nodes += _gate(list(node.input[:3]), layer, at)
            node.input.append(at)
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _linear(given: str, weight: str, bias: str, layer: int, out: str) -> Any:
    """``out`` = ``given`` . weight' + bias; names of tensors have a place for the layer's number."""
    inputs = [given, weight.format(layer), bias.format(layer)]
    return helper.make_node("Gemm", inputs, [out], name=out + "/Gemm", transB=1)


def _network(parts: list[str], layer: int, at: str) -> list[Any]:
    """Locret's head: outer . SiLU(inner . ``parts``) with biases; ``parts`` are queries, keys and values."""
    joined, inside = f"{at}.joined.out", f"{at}.inside.out"
    return [
        helper.make_node("Concat", parts, [joined], name=joined, axis=1),
        _linear(joined, INNER, INNER_BIAS, layer, inside),
        *_outer(inside, layer, at),
    ]


def _outer(inside: str, layer: int, at: str) -> list[Any]:
    """outer . SiLU(``inside``) with its bias."""
    gate, bent = f"{at}.gate.out", f"{at}.bent.out"
    return [
        helper.make_node("Sigmoid", [inside], [gate], name=gate),
        helper.make_node("Mul", [inside, gate], [bent], name=bent),
        _linear(bent, OUTER, OUTER_BIAS, layer, at),
    ]


def _gate(parts: list[str], layer: int, at: str) -> list[Any]:
    """Attention-Gate's head, as `calibration.gate_head.Gate` has it, over the tokens of the run."""
    joined, queries, keys, values, own = (f"{at}.{name}.out" for name in ("joined", "queries", "keys", "values", "own"))
    alike, logits, shares, given = (f"{at}.{name}.out" for name in ("alike", "logits", "shares", "given"))
    found, inside = f"{at}.found.out", f"{at}.inside.out"
    return [
        helper.make_node("Concat", parts, [joined], name=joined, axis=1),
        _linear(joined, QUERY, QUERY_BIAS, layer, queries),
        _linear(joined, KEY, KEY_BIAS, layer, keys),
        _linear(joined, VALUE, VALUE_BIAS, layer, values),
        _linear(joined, INNER, INNER_BIAS, layer, own),
        helper.make_node("Gemm", [queries, keys, NOBODY.format(layer)], [alike], name=alike, transB=1, beta=-1.0),
        helper.make_node("Mul", [alike, OTHERS], [logits], name=logits),
        helper.make_node("Softmax", [logits], [shares], name=shares, axis=-1),
        helper.make_node("Mul", [shares, OTHERS], [given], name=given),
        helper.make_node("MatMul", [given, values], [found], name=found),
        helper.make_node("Gemm", [found, MIXED.format(layer), own], [inside], name=inside, transB=1),
        *_outer(inside, layer, at),
    ]


def _others() -> list[Any]:
    """`OTHERS`, once for all layers: tokens of a run differ in their positions."""
    constants = [
        helper.make_node("Constant", [], [name], name=name, value_ints=[axis])
        for name, axis in ((OTHERS + ".down", 1), (OTHERS + ".across", 0))
    ]
    down, across, same, differ = (f"{OTHERS}.{name}.out" for name in ("down", "across", "same", "differ"))
    return [
        *constants,
        helper.make_node("Unsqueeze", ["positions", OTHERS + ".down"], [down], name=down),
        helper.make_node("Unsqueeze", ["positions", OTHERS + ".across"], [across], name=across),
        helper.make_node("Equal", [down, across], [same], name=same),
        helper.make_node("Not", [same], [differ], name=differ),
        helper.make_node("Cast", [differ], [OTHERS], name=OTHERS, to=onnx.TensorProto.FLOAT),
    ]
