"""The graphs of the portable engine: the package's own, fitted to a device's storage, and those that prune its cache.

Pruning runs where the cache is: a scorer's graph ranks the pairs of a layer, the best are gathered in their order, and
only the numbers of the kept slots come back to the host. The scorers are those of `cache.scorers`, written once more in
ONNX; tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...cache.scorers import find_scorer
from ...export.operators.portable import rope_constants
from ...export.package import Package
from ...export.portable_layout import OBSERVED
from ...export.spec import ModelSpec

OPSET, IR_VERSION, MICROSOFT = 21, 10, "com.microsoft"
ELEMENTS = {"bf16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}  # 16 bits are float16 here
POOL = 5  # neighbours that SnapKV smooths over
ALWAYS = np.float32(3e38)  # the score of what is never given up


def fitted_graph(package: Package, storage: str, scorer: str) -> onnx.ModelProto:
    """The package's graph with keys and values in ``storage``, and with the queries that ``scorer`` looks at.

    Its weights stay where they are: in the file beside it.
    """
    model = onnx.load(str(package.model_file), load_external_data=False)
    changes: dict[str, np.ndarray[tuple[int, ...], np.dtype[Any]]] = {}
    if package.yarn_factor > 1:
        changes |= {"rope.all." + name: values for name, values in rope_constants(package.spec.rope).items()}
    observed = find_scorer(scorer).observed_queries
    if observed:
        changes[OBSERVED] = np.array([-observed], np.int64)
    else:
        _drop_queries(model.graph)
    for tensor in model.graph.initializer:
        if tensor.name in changes:
            tensor.CopyFrom(numpy_helper.from_array(changes[tensor.name], tensor.name))
    if ELEMENTS[storage] != TensorProto.FLOAT:
        _store_as(model.graph, ELEMENTS[storage])
    return model


def _drop_queries(graph: onnx.GraphProto) -> None:
    for infos in (graph.input, graph.output):
        for info in [info for info in infos if info.name.endswith(".queries")]:
            infos.remove(info)
    unused = [node for node in graph.node if node.output[0].endswith((".queries", ".queries.joined"))]
    for node in unused:
        graph.node.remove(node)


def _store_as(graph: onnx.GraphProto, element: int) -> None:
    """Casts around each attention: its state is ``element`` then, the rest of the graph float32."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type != "GroupQueryAttention":
            graph.node.append(node)
            continue
        for place in range(3):
            cast = f"{node.input[place]}.stored"
            graph.node.append(helper.make_node("Cast", [node.input[place]], [cast], name=cast, to=element))
            node.input[place] = cast
        attended = node.output[0]
        node.output[0] = attended + ".stored"
        graph.node.append(node)
        graph.node.append(
            helper.make_node("Cast", [node.output[0]], [attended], name=attended + "/Cast", to=TensorProto.FLOAT)
        )
    for info in (*graph.input, *graph.output):
        if info.name.endswith((".key", ".value")):
            info.type.tensor_type.elem_type = element


class _Pruning:
    """Collects the nodes of one pruning graph."""

    def __init__(self, spec: ModelSpec, element: int) -> None:
        self.spec = spec
        self.element = element
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        kv: list[int | str] = [1, spec.kv_heads, "tokens", spec.head_size]
        self.inputs = [
            helper.make_tensor_value_info("key", element, kv), helper.make_tensor_value_info("value", element, kv)
        ]  # fmt: skip
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, element: int, dims: list[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element, dims))
        return name

    def output(self, name: str, element: int, dims: list[int | str]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, element, dims))

    def node(self, kind: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        name = f"{kind}.{len(self.nodes)}"
        outputs = [name + ".values", name] if kind == "TopK" else [name]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))
        return name

    def number(self, value: int | list[int]) -> str:
        return self._constant(np.array(value, np.int64))

    def real(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def _constant(self, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        name = f"{value.dtype}.{value.tolist()}"
        self.constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def heads(self, name: str) -> str:
        """An input without its first dimension: [K, T, D]."""
        return self.node("Squeeze", [name, self.number([0])])

    def keys(self) -> str:
        """float32 [K, T, D]"""
        return self.node("Cast", [self.heads("key")], to=TensorProto.FLOAT)

    def gather(self, kept: str) -> None:
        """The outputs ``kept_key`` and ``kept_value``: the slots ``kept`` int64 [K, n] of each head."""
        index = self.node("Unsqueeze", [kept, self.number([2])])
        for name in ("key", "value"):
            found = self.node("GatherND", [self.heads(name), index], batch_dims=1)
            self.nodes.append(helper.make_node("Unsqueeze", [found, self.number([0])], ["kept_" + name]))
            self.output("kept_" + name, self.element, [1, self.spec.kv_heads, "kept", self.spec.head_size])

    def select(self, scores: str) -> None:
        """The output ``kept``: slots of sinks, window and the best-scored others, ascending, and what is there."""
        sinks, window, budget = (self.input(name, TensorProto.INT64, [1]) for name in ("sinks", "window", "budget"))
        tokens = self.node("Shape", ["key"], start=2, end=3)
        scalar = self.node("Squeeze", [tokens])
        slots = self.node("Range", [self.number(0), scalar, self.number(1)])
        recent = self.node("GreaterOrEqual", [slots, self.node("Sub", [tokens, window])])
        always = self.node("Or", [self.node("Less", [slots, sinks]), recent])
        ranked = self.node("Where", [always, self.real(float(ALWAYS)), scores])
        best = self.node("TopK", [ranked, budget], axis=-1, largest=1, sorted=0)
        ordered = self.node("TopK", [best, budget], axis=-1, largest=0, sorted=1)
        self.nodes.append(helper.make_node("Identity", [ordered + ".values"], ["kept"]))
        self.output("kept", TensorProto.INT64, [self.spec.kv_heads, "kept"])
        self.gather("kept")

    def model(self) -> bytes:
        graph = helper.make_graph(
            self.nodes, "pruning", self.inputs, self.outputs, initializer=list(self.constants.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="satchel")
        model.ir_version = IR_VERSION
        content: bytes = model.SerializeToString()
        return content


def _recency(graph: _Pruning) -> str:
    positions = graph.input("positions", TensorProto.INT64, [graph.spec.kv_heads, "tokens"])
    return graph.node("Cast", [positions], to=TensorProto.FLOAT)


def _keydiff(graph: _Pruning) -> str:
    keys, axis, least = graph.keys(), graph.number([2]), graph.real(1e-12)
    norms = graph.node("Max", [graph.node("ReduceL2", [keys, axis]), least])
    directions = graph.node("Div", [keys, norms])
    anchor = graph.node("ReduceMean", [directions, graph.number([1])])
    anchor = graph.node("Div", [anchor, graph.node("Max", [graph.node("ReduceL2", [anchor, axis]), least])])
    cosines = graph.node("MatMul", [directions, graph.node("Transpose", [anchor], perm=[0, 2, 1])])
    return graph.node("Neg", [graph.node("Squeeze", [cosines, axis])])


def _snapkv(graph: _Pruning) -> str:
    spec = graph.spec
    group, width = spec.heads // spec.kv_heads, spec.heads * spec.head_size
    half = spec.rope.dims // 2
    positions = graph.input("positions", TensorProto.INT64, [spec.kv_heads, "tokens"])
    queries = graph.input("queries", TensorProto.FLOAT, ["observed", width])
    places = graph.input("query_positions", TensorProto.INT64, ["observed"])
    turns = [graph.input(name, TensorProto.FLOAT, ["observed", half]) for name in ("cosine", "sine")]
    batched = graph.node("Unsqueeze", [queries, graph.number([0])])
    turned = graph.node(
        "RotaryEmbedding", [batched, graph.number([0]), *turns], MICROSOFT,
        num_heads=spec.heads, rotary_embedding_dim=spec.rope.dims if spec.rope.dims < spec.head_size else 0,
    )  # fmt: skip
    split = graph.node("Reshape", [turned, graph.number([-1, spec.kv_heads, group, spec.head_size])])
    by_head = graph.node("Transpose", [split], perm=[1, 2, 0, 3])  # [K, G, W, D]
    keys = graph.node("Mul", [graph.keys(), graph.real(spec.attention_scale)])
    keys = graph.node("Unsqueeze", [graph.node("Transpose", [keys], perm=[0, 2, 1]), graph.number([1])])
    logits = graph.node("MatMul", [by_head, keys])  # [K, G, W, T]
    theirs = graph.node("Unsqueeze", [positions, graph.number([1])])
    unseen = graph.node("Greater", [theirs, graph.node("Unsqueeze", [places, graph.number([0, 2])])])  # [K, W, T]
    masked = graph.node(
        "Where", [graph.node("Unsqueeze", [unseen, graph.number([1])]), graph.real(-float(ALWAYS)), logits]
    )
    weights = graph.node("Softmax", [masked], axis=-1)
    mass = graph.node("ReduceMean", [weights, graph.number([1, 2])], keepdims=0)
    pooled = graph.node(
        "AveragePool", [graph.node("Unsqueeze", [mass, graph.number([1])])],
        kernel_shape=[POOL], pads=[POOL // 2, POOL // 2], count_include_pad=0,
    )  # fmt: skip
    return graph.node("Squeeze", [pooled, graph.number([1])])


_SCORERS: dict[str, Callable[[_Pruning], str]] = {"recency": _recency, "keydiff": _keydiff, "snapkv": _snapkv}
SCORERS = tuple(_SCORERS)


def pruning_graph(spec: ModelSpec, storage: str, scorer: str) -> bytes:
    """Keeps the pairs of a layer that ``scorer`` ranks highest.

    Inputs: ``key``, ``value``; ``sinks``, ``window``, ``budget`` int64 [1]; and of ``positions`` int64 [K, T],
    ``queries``, ``query_positions``, ``cosine``, ``sine`` those that the scorer looks at. Outputs: ``kept`` int64
    [K, budget], ``kept_key``, ``kept_value``.
    """
    graph = _Pruning(spec, ELEMENTS[storage])
    graph.select(_SCORERS[scorer](graph))
    return graph.model()


def gathering_graph(spec: ModelSpec, storage: str) -> bytes:
    """Keeps given slots of a layer: inputs ``key``, ``value``, ``kept``; outputs ``kept_key``, ``kept_value``."""
    graph = _Pruning(spec, ELEMENTS[storage])
    graph.gather(graph.input("kept", TensorProto.INT64, [spec.kv_heads, "kept"]))
    return graph.model()
