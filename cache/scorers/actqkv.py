"""What outstanding queries look at matters (ActQKV, arXiv 2502.13542): a few probe queries stand for a whole window.

The activation bias of a query is how far it lies from the window's mean, channel by channel in units of the window's
spread, before RoPE; the `PROBES` queries with the largest one, for each KV head, are its probe. The score [K, T] is
their mean attention, over the group's query heads.

Departures: the window is the last `observed_queries` of a chunk; the attention of the probe queries is averaged, where
the paper compares one probe vector with blocks of keys that it retrieves; the bias is the mean square over channels and
query heads, written from the paper's description and not checked against its equation. Its cut-off by information
density gives each layer a budget of its own, by looking at all layers: a scorer sees one layer, all of which have the
same budget, so there is none here (`--kv head_budgets=adaptive` moves budget between the heads of a layer).
"""

from __future__ import annotations

import numpy as np

from .attention import attention_sum
from .base import Floats, LayerView, Scorer

PROBES = 8


class ActQKV(Scorer):
    name = "actqkv"
    paper = "ActQKV, arXiv 2502.13542"
    observed_queries = 64

    def score(self, view: LayerView) -> Floats:
        kv_heads = len(view.keys)
        biases = activation_bias(view.queries, kv_heads)
        probes = min(PROBES, len(view.queries))
        weights = np.zeros_like(biases)
        best = np.argsort(-biases, axis=1, kind="stable")[:, :probes]
        np.put_along_axis(weights, best, np.float32(1 / max(probes * view.queries.shape[1] // kv_heads, 1)), axis=1)
        return attention_sum(view, weights=weights)


def activation_bias(queries: Floats, kv_heads: int) -> Floats:
    """float32 [K, W] of queries [W, H, D]: the mean square of each one's distance in standard deviations."""
    windows, heads, size = queries.shape
    if not windows:
        return np.zeros((kv_heads, 0), dtype=np.float32)
    spread = np.maximum(queries.std(axis=0), 1e-6)
    distances = (queries - queries.mean(axis=0)) / spread
    grouped = np.square(distances).reshape(windows, kv_heads, heads // kv_heads, size)
    biases: Floats = grouped.mean(axis=(2, 3)).T.astype(np.float32)
    return biases
