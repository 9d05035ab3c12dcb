"""What a linear head on the attention's input foretells matters (KVzap, arXiv 2601.07891).

`satchel calibrate` fits the head. The graph works the scores out while a chunk is read, so
scoring costs nothing, needs no queries, and holds for questions that nobody has asked yet.

Departures: the paper drops what is below a threshold (-4) as soon as it leaves a window of 128 tokens, so that a cache
is as long as its text deserves; we keep the best within a budget per KV head, as every scorer here, and the window is
that of the settings.
"""

from __future__ import annotations

from .base import Floats, LayerView, Scorer


class KVzap(Scorer):
    name = "kvzap"
    paper = "KVzap, arXiv 2601.07891"
    needs_pairs = False
    needs_retention = True

    def score(self, view: LayerView) -> Floats:
        assert view.retention is not None, "a view made for this scorer"
        scores: Floats = view.retention.copy()
        return scores
