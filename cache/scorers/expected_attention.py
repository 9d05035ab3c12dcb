"""What future queries will look at matters (Expected Attention, arXiv 2510.00636).

Queries before RoPE are taken as a Gaussian; the next positions rotate it on average by R. A key's expected weight is
then exp(k.R mu * scale + k' R C R' k * scale^2 / 2); it counts as much as its value is long.

Departures: the Gaussian is that of the chunk's last queries, not of the whole prompt, and the group's query heads are
averaged after the softmax.
"""

from __future__ import annotations

import numpy as np

from .base import Floats, LayerView, Scorer

FUTURE_POSITIONS = 512


class ExpectedAttention(Scorer):
    name = "expected-attention"
    paper = "Expected Attention, arXiv 2510.00636"
    observed_queries = 128
    needs_value_norms = True

    def score(self, view: LayerView) -> Floats:
        kv_heads, tokens, size = view.keys.shape
        heads = view.queries.shape[1]
        rotation = _mean_rotation(view, size)
        scores = np.zeros((kv_heads, tokens), dtype=np.float32)
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            keys, sample = view.keys[kv_head], view.queries[:, head]
            mean = sample.mean(axis=0)
            centred = (sample - mean) @ rotation.T
            covariance = centred.T @ centred / np.float32(max(len(sample) - 1, 1))
            logits = keys @ (rotation @ mean) * np.float32(view.scale)
            spread = np.einsum("td,td->t", keys @ covariance, keys, optimize=True)
            logits += spread * np.float32(view.scale**2 / 2)
            weights = np.exp(logits - logits.max())
            scores[kv_head] += weights / weights.sum()
        return scores * view.value_norms


def _mean_rotation(view: LayerView, size: int) -> Floats:
    """The mean of the rotations of the next positions, float32 [D, D]."""
    half = view.frequencies.size
    ahead = int(view.query_positions[-1]) + 1 + np.arange(FUTURE_POSITIONS, dtype=np.float64)
    angles = ahead[:, None] * view.frequencies.astype(np.float64)
    cos, sin = np.cos(angles).mean(axis=0), np.sin(angles).mean(axis=0)
    rotation = np.eye(size, dtype=np.float32)
    first, second = np.arange(half), np.arange(half) + half
    rotation[first, first], rotation[first, second] = cos, -sin
    rotation[second, second], rotation[second, first] = cos, sin
    return rotation
