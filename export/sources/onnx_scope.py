"""Which initializer a value of an ONNX graph is, behind casts and transpositions, in graphs within graphs.

Two branches of an ``If`` see the values of the graph around them; torch writes copies of equal weights as ``Identity``
of a single one, under the names that the copies had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .onnx_graph import Graph, Initializer, Node

MAX_STEPS = 8  # between a weight and its use


@dataclass(frozen=True)
class Use:
    """An initializer in its place. ``whole``: a norm's weight that activations are multiplied with as it is, so that
    Gemma's 1 is in it already.
    """

    tensor: Initializer
    transposed: bool = False
    whole: bool = False


class Scope:
    """What the values of a graph are: those of the graphs around it are known, too."""

    def __init__(self, graph: Graph, outer: Scope | None = None) -> None:
        self.graph = graph
        self._outer = outer
        self._steps = {
            node.outputs[0]: node for node in graph.nodes
            if node.operator in ("Identity", "Cast", "Transpose") and node.outputs and node.inputs
        }  # fmt: skip

    def find(self, value: str) -> Use | None:
        """The initializer that ``value`` is, perhaps transposed."""
        transposed = False
        for _ in range(MAX_STEPS):
            tensor, node = self._lookup(value)
            if tensor is not None:
                return Use(tensor, transposed)
            if node is None:
                return None
            if node.operator == "Transpose":
                perm = node.attributes.get("perm", [1, 0])
                if sorted(perm) != [0, 1]:
                    return None
                transposed ^= perm == [1, 0]
            value = node.inputs[0]
        return None

    def _lookup(self, value: str) -> tuple[Initializer | None, Node | None]:
        scope: Scope | None = self
        while scope is not None:
            tensor, node = scope.graph.initializers.get(value), scope._steps.get(value)
            if tensor is not None or node is not None:
                return tensor, node
            scope = scope._outer
        return None, None

    def names(self) -> Iterator[tuple[str, Use]]:
        """Every name of an initializer: copies of equal ones are ``Identity`` of a single one."""
        for name in [*self.graph.initializers, *self._steps]:
            use = self.find(name)
            if use is not None and not use.transposed:
                yield name, use


def all_scopes(scope: Scope) -> Iterator[Scope]:
    """``scope`` and those within."""
    yield scope
    for node in scope.graph.nodes:
        for graph in node.graphs:
            yield from all_scopes(Scope(graph, scope))
