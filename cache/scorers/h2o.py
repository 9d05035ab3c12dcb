"""Heavy hitters matter (H2O, arXiv 2306.14048): the attention that a pair has had from all queries so far.

The mass of each pair [K, T] is kept from one pruning to the next (`LayerView.kept`) and goes on growing.

Departures: queries are observed at the end of each chunk only, the last `OBSERVED` of it; their mean attention to a key
counts once for every query since the last pruning that could see the key. The paper gives half of the budget to recent
pairs; here the cache's window is that half. The group's query heads are summed.
"""

from __future__ import annotations

import numpy as np

from .attention import attention_sum, seen_by
from .base import Floats, LayerView, Scorer

OBSERVED = 64


class H2O(Scorer):
    name = "h2o"
    paper = "H2O, arXiv 2306.14048"
    observed_queries = OBSERVED
    keeps_scores = True

    def score(self, view: LayerView) -> Floats:
        return view.kept + new_mass(view)


def new_mass(view: LayerView, *, bias: Floats | None = None, temperature: float = 1.0) -> Floats:
    """float32 [K, T]: attention from the queries since the last scoring, as those that were observed tell of it."""
    if not view.query_positions.size:
        return np.zeros(view.positions.shape, dtype=np.float32)
    first = int(np.searchsorted(view.query_positions, view.scored_until))
    is_new = np.broadcast_to((np.arange(view.query_positions.size) >= first).astype(np.float32),
                             (len(view.keys), view.query_positions.size))  # fmt: skip
    mass = attention_sum(view, weights=is_new, bias=bias, temperature=temperature)
    until = int(view.query_positions[-1]) + 1
    could_see = np.clip(until - np.maximum(view.positions, view.scored_until), 0, None).astype(np.float32)
    grown: Floats = mass / np.maximum(seen_by(view, first), 1) * could_see
    return grown
