"""The parts of an ONNX graph that say where weights lie and what they are used for: nodes and initializers.

Read from the wire format (facts: onnx.proto), without the weights, which are later read by ranges of rows from where
they lie: within the file or, as ``external_data``, in another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from .protobuf import LENGTH, VARINT, Field, ProtoFile

MAX_DEPTH = 8  # graphs within graphs: a merged decoder has two
MAX_DIMENSIONS = 8
MAX_EXTENT = 1 << 44
# ONNX' number of a type -> (GGML's name of the types we read, bytes per element)
TYPES = {1: ("F32", 4), 10: ("F16", 2), 16: ("BF16", 2)}
_NONE: Mapping[str, list[float]] = {}
_ATTRIBUTES = ("transA", "transB", "perm", "alpha")


@dataclass(frozen=True)
class Initializer:
    """A constant of a graph: bytes ``start`` … ``stop`` − 1 of its file, or, if ``external`` says so, of another.

    ``start`` is −1 where the values are in a form that cannot be read by ranges.
    """

    name: str
    shape: tuple[int, ...]
    data_type: int
    start: int = -1
    stop: int = -1
    external: Mapping[str, str] | None = None

    @property
    def type_name(self) -> str:
        """GGML's name, or empty."""
        return TYPES.get(self.data_type, ("", 0))[0]

    @property
    def size(self) -> int:
        """Bytes, of a type that has a name."""
        return math.prod(self.shape) * TYPES[self.data_type][1]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation, with those of its attributes that matter for weights."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, list[float]]
    graphs: tuple[Graph, ...]


@dataclass
class Graph:
    """Nodes and initializers; those of ``If`` and ``Loop`` have graphs of their own."""

    nodes: list[Node] = field(default_factory=list)
    initializers: dict[str, Initializer] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def read_graph(path: Path, file: FileIO) -> Graph:
    """The graph of an open .onnx file.

    Raises:
        ModelError: the file is cut short, or is no ONNX model.
    """
    proto = ProtoFile(path, file)
    graphs = [entry for entry in proto.fields(0, proto.size) if entry.number == 7]
    if len(graphs) != 1:
        raise proto.damaged(f"it has {len(graphs)} graphs instead of one")
    return _graph(proto, graphs[0], 1)


def _graph(proto: ProtoFile, at: Field, depth: int) -> Graph:
    if depth > MAX_DEPTH:
        raise proto.damaged(f"its graphs are nested more than {MAX_DEPTH} deep")
    graph = Graph()
    for entry in proto.message(at):
        if entry.number == 1:
            graph.nodes.append(_node(proto, entry, depth))
        elif entry.number == 5:
            tensor = _initializer(proto, entry)
            if tensor.name in graph.initializers:
                raise proto.damaged(f"it has two initializers {tensor.name[:100]!r}")
            graph.initializers[tensor.name] = tensor
        elif entry.number in (11, 12):
            names = [proto.text(part) for part in proto.message(entry) if part.number == 1]
            (graph.inputs if entry.number == 11 else graph.outputs).extend(names)
    return graph


def _node(proto: ProtoFile, at: Field, depth: int) -> Node:
    operator = name = ""
    inputs: list[str] = []
    outputs: list[str] = []
    attributes: list[Field] = []
    for entry in proto.message(at):
        if entry.number == 1:
            inputs.append(proto.text(entry))
        elif entry.number == 2:
            outputs.append(proto.text(entry))
        elif entry.number == 3:
            name = proto.text(entry)
        elif entry.number == 4:
            operator = proto.text(entry)
        elif entry.number == 5:
            attributes.append(entry)
    values, graphs = _attributes(proto, attributes, depth) if attributes else (_NONE, ())
    return Node(operator, name, tuple(inputs), tuple(outputs), values, graphs)


def _attributes(
    proto: ProtoFile, fields: list[Field], depth: int
) -> tuple[Mapping[str, list[float]], tuple[Graph, ...]]:
    """(what the attributes in `_ATTRIBUTES` are, all graphs)"""
    found: dict[str, list[float]] = {}
    graphs: list[Graph] = []
    for at in fields:
        name, values = "", []
        for entry in proto.message(at):
            if entry.number == 1:
                name = proto.text(entry)
            elif entry.number in (2, 3, 8):  # a number, an integer, integers
                values.append(entry)
            elif entry.number in (6, 11):
                graphs.append(_graph(proto, entry, depth + 1))
        if name in _ATTRIBUTES:
            found[name] = []
            for entry in values[:MAX_DIMENSIONS]:
                one = entry.number == 2
                found[name] += [proto.number(entry)] if one else proto.integers(entry, MAX_DIMENSIONS)
    return found or _NONE, tuple(graphs)


def _initializer(proto: ProtoFile, at: Field) -> Initializer:
    name, dims, data_type, outside = "", [], 0, False
    places: list[Field] = []
    external: dict[str, str] = {}
    for entry in proto.message(at):
        if entry.number == 1:
            dims += proto.integers(entry, MAX_DIMENSIONS)
            if len(dims) > MAX_DIMENSIONS:
                raise proto.damaged(f"an initializer has more than {MAX_DIMENSIONS} dimensions")
        elif entry.number == 2 and entry.wire == VARINT:
            data_type = entry.value
        elif entry.number == 8:
            name = proto.text(entry)
        elif entry.number in (4, 9) and entry.wire == LENGTH:  # float32 numbers one after the other, or raw bytes
            places.append(entry)
        elif entry.number == 13:
            pair = {part.number: proto.text(part) for part in proto.message(entry)}
            external[pair.get(1, "")] = pair.get(2, "")
        elif entry.number == 14:
            outside = entry.value == 1
    if not name.isprintable() or not name:
        raise proto.damaged(f"it has an initializer with the name {name[:100]!r}")
    if any(size < 0 for size in dims) or math.prod(dims) > MAX_EXTENT:
        raise proto.damaged(f"initializer {name[:100]!r} has the impossible shape {dims!r:.80}")
    if outside:
        return Initializer(name, tuple(dims), data_type, external=external)
    if len(places) != 1 or (places[0].number == 4 and data_type != 1):
        return Initializer(name, tuple(dims), data_type)
    return Initializer(name, tuple(dims), data_type, places[0].start, places[0].stop)
