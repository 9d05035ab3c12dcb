"""What the prompt looks at matters (Finch, arXiv 2408.00167): attention of the last queries, free of their position.

A query that sees more keys spreads its attention thinner: its row is multiplied by the number of keys it sees, so that
1 is what each would get if all got the same. The score [K, T] is the mean over the queries that see a key, and over
the group's query heads; it is not smoothed.

Departures: the document is read before the question is known, so that the last queries of each chunk stand for the
prompt; keys keep their own positions, where the paper moves what is left together.
"""

from __future__ import annotations

import numpy as np

from .attention import attention_sum, seen_by
from .base import Floats, LayerView, Scorer


class Finch(Scorer):
    name = "finch"
    paper = "Finch, arXiv 2408.00167"
    observed_queries = 32

    def score(self, view: LayerView) -> Floats:
        kv_heads = len(view.keys)
        sees = np.stack([np.searchsorted(places, view.query_positions, side="right") for places in view.positions])
        sums = attention_sum(view, weights=sees.astype(np.float32))
        group = view.queries.shape[1] // kv_heads
        means: Floats = sums / (np.float32(group) * np.maximum(seen_by(view), 1))
        return means
