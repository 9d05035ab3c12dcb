"""The attention that observed queries give to a head's keys: what several scorers sum up, each in its own way."""

from __future__ import annotations

import numpy as np

from .base import Floats, LayerView, rotate


def attention_sum(
    view: LayerView,
    *,
    weights: Floats | None = None,
    bias: Floats | None = None,
    temperature: float = 1.0,
) -> Floats:
    """float32 [K, T]: the softmax attention of every query, summed over queries and over the group's query heads.

    A query sees keys at its own position and before. ``weights`` [K, W]: of each query in the sum (None: 1); ``bias``
    [K, T] is added to the logits, which are then divided by ``temperature``.
    """
    kv_heads, tokens, _ = view.keys.shape
    sums = np.zeros((kv_heads, tokens), dtype=np.float32)
    if not view.query_positions.size:
        return sums
    queries = rotate(view.queries, view.query_positions, view.frequencies)
    group = queries.shape[1] // kv_heads
    for head in range(kv_heads):
        keys = view.keys[head] * np.float32(view.scale / temperature)
        newest = int(np.searchsorted(view.positions[head], view.query_positions[0], side="right"))
        unseen = view.positions[head, newest:] > view.query_positions[:, None]
        for row in range(head * group, (head + 1) * group):
            logits = queries[:, row] @ keys.T
            if bias is not None:
                logits += bias[head] / np.float32(temperature)
            logits[:, newest:][unseen] = -np.inf
            logits -= logits.max(axis=1, keepdims=True)
            exponentials = np.exp(logits, out=logits)
            inverse = 1 / exponentials.sum(axis=1)
            sums[head] += (inverse if weights is None else weights[head] * inverse) @ exponentials
    return sums


def seen_by(view: LayerView, first: int = 0) -> Floats:
    """float32 [K, T]: how many of the observed queries, from index ``first`` on, see each key."""
    asked = view.query_positions[first:]
    counts: Floats = (asked.size - np.searchsorted(asked, view.positions)).astype(np.float32)
    return counts
