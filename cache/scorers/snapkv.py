"""What the last queries look at matters (SnapKV, arXiv 2404.14469): their mean attention, smoothed over neighbours.

The paper scores once, at the end of the prompt, and average-pools by 5 here as published. We score at the end of each
chunk, so that a document of any length is read inside the budget; the group's query heads are averaged.
"""

from __future__ import annotations

import numpy as np

from .attention import attention_sum
from .base import Floats, LayerView, Scorer

POOL = 5


class SnapKV(Scorer):
    name = "snapkv"
    paper = "SnapKV, arXiv 2404.14469"
    observed_queries = 32

    def score(self, view: LayerView) -> Floats:
        scores = attention_sum(view)
        group, queries = view.queries.shape[1] // len(scores), len(view.queries)
        for head in range(len(scores)):
            scores[head] = pool(scores[head] / np.float32(max(group * queries, 1)))
        return scores


def pool(values: Floats) -> Floats:
    """Mean over a window of ``POOL`` tokens, shorter at the ends."""
    kernel = np.ones(POOL, dtype=np.float32)
    middle = slice(POOL // 2, POOL // 2 + values.size)  # numpy's "same" would be the longer of the two
    return np.convolve(values, kernel)[middle] / np.convolve(np.ones_like(values), kernel)[middle]
