"""What the last queries look at matters (SnapKV, arXiv 2404.14469): their mean attention, smoothed over neighbours.

The paper scores once, at the end of the prompt, and average-pools by 5 here as published. We score at the end of each
chunk, so that a document of any length is read inside the budget; the group's query heads are averaged.
"""

from __future__ import annotations

import numpy as np

from .base import Floats, LayerView, Scorer, rotate

POOL = 5


class SnapKV(Scorer):
    name = "snapkv"
    paper = "SnapKV, arXiv 2404.14469"
    observed_queries = 32

    def score(self, view: LayerView) -> Floats:
        kv_heads, tokens, _ = view.keys.shape
        queries = rotate(view.queries, view.query_positions, view.frequencies)
        group = queries.shape[1] // kv_heads
        scores = np.empty((kv_heads, tokens), dtype=np.float32)
        for head in range(kv_heads):
            keys = view.keys[head] * np.float32(view.scale)
            newest = int(np.searchsorted(view.positions[head], view.query_positions[0], side="right"))
            unseen = view.positions[head, newest:] > view.query_positions[:, None]
            mass = np.zeros(tokens, dtype=np.float32)
            for row in range(head * group, (head + 1) * group):
                logits = queries[:, row] @ keys.T
                logits[:, newest:][unseen] = -np.inf
                logits -= logits.max(axis=1, keepdims=True)
                weights = np.exp(logits, out=logits)
                mass += (1 / weights.sum(axis=1)) @ weights
            scores[head] = pool(mass / np.float32(group * len(queries)))
        return scores


def pool(values: Floats) -> Floats:
    """Mean over a window of ``POOL`` tokens, shorter at the ends."""
    kernel = np.ones(POOL, dtype=np.float32)
    middle = slice(POOL // 2, POOL // 2 + values.size)  # numpy's "same" would be the longer of the two
    return np.convolve(values, kernel)[middle] / np.convolve(np.ones_like(values), kernel)[middle]
