"""Retention heads as their calibration leaves them in a package, and as the graph takes them.

``kvzap``: a linear map of what a layer's attention reads. ``locret``: a network with one inner layer over the queries,
keys and values that it takes. ``attention-gate``: such a network, and a small attention over the tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..package import Package
from ..spec import ModelSpec
from .files import Calibration, Floats, open_calibration, write_calibration
from .gate_head import SIZE, VALUE_SIZE
from .gate_head import WIDTH as GATE_WIDTH
from .retaining_head import WIDTH

KVZAP, LOCRET, ATTENTION_GATE = "kvzap", "locret", "attention-gate"
WEIGHT, BIAS = "layers.{}.retention.weight", "layers.{}.retention.bias"
INNER, INNER_BIAS = "layers.{}.retention.inner", "layers.{}.retention.inner_bias"
OUTER, OUTER_BIAS = "layers.{}.retention.outer", "layers.{}.retention.outer_bias"
QUERY, QUERY_BIAS = "layers.{}.retention.query", "layers.{}.retention.query_bias"
KEY, KEY_BIAS = "layers.{}.retention.key", "layers.{}.retention.key_bias"
VALUE, VALUE_BIAS = "layers.{}.retention.value", "layers.{}.retention.value_bias"
NOBODY, MIXED = "layers.{}.retention.nobody", "layers.{}.retention.mixed"


def write_retention(
    package: Package, method: str, weights: Floats, biases: Floats, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes one linear map per layer, from what its attention reads to a score for each KV head: ``weights`` float32
    [L, K, hidden], ``biases`` float32 [L, K]; and returns their record. Raises as `write_calibration`.
    """
    tensors = {}
    for layer in range(len(weights)):
        tensors[WEIGHT.format(layer)] = weights[layer]
        tensors[BIAS.format(layer)] = biases[layer]
    return write_calibration(package, method, tensors, figures)


def pair_features(spec: ModelSpec) -> int:
    """How many numbers a layer's queries, keys and values of one token are."""
    return (spec.heads + 2 * spec.kv_heads) * spec.head_size


def retention_shapes(spec: ModelSpec, method: str) -> dict[str, tuple[int, ...]]:
    """What ``method`` has for a layer: shapes by name, with a place for the layer's number."""
    features, kv_heads = pair_features(spec), spec.kv_heads
    if method == KVZAP:
        return {WEIGHT: (kv_heads, spec.hidden), BIAS: (kv_heads,)}
    width = WIDTH if method == LOCRET else GATE_WIDTH
    network = {INNER: (width, features), INNER_BIAS: (width,), OUTER: (kv_heads, width), OUTER_BIAS: (kv_heads,)}
    if method == LOCRET:
        return network
    return network | {
        QUERY: (SIZE, features), QUERY_BIAS: (SIZE,), KEY: (SIZE, features), KEY_BIAS: (SIZE,),
        VALUE: (VALUE_SIZE, features), VALUE_BIAS: (VALUE_SIZE,), NOBODY: (1,), MIXED: (width, VALUE_SIZE),
    }  # fmt: skip


def open_retention(package: Package, method: str) -> Calibration:
    """The heads of ``method``. Raises as `open_calibration`."""
    shapes = retention_shapes(package.spec, method).items()
    of_all = {name.format(layer): shape for layer in range(package.spec.layers) for name, shape in shapes}
    return open_calibration(package, method, of_all)
