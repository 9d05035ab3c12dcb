"""What the model needs to say the text again matters (KVzip, arXiv 2505.23416), whatever will be asked of it.

The text is read whole. Then, piece by piece, the model is asked to repeat it and reads the piece a second time: a
pair's score [K, T] is the largest share of attention that any of these queries gives it, over the query heads that
read its KV head, times the length of its value (`runtime/compiling.py` does this, the cache keeps the scores). So a
text is compiled once, for all questions.

What is read after that (questions, answers) has no such score. It ranks below what has one, the newest first: a
conversation takes no room from the document, and of itself keeps what the cache's window holds and the budget has left.

Departures: the paper has the shares alone, which lost the needle in an eighth of the pairs here: much of the attention
goes to pairs whose values are nearly nothing. VATP (arXiv 2406.12335) puts the length of the value beside it, and KVzap
(arXiv 2601.07891) that of what the output projection makes of it, relative to the residual stream. Shares are of the
softmax over all that a query sees, where the paper leaves other pieces of the text out of it; of a text that came in
parts, what was dropped of the earlier ones is no longer seen. The paper compares the heads of all layers with each
other, `head_budgets=adaptive` those of a layer, and `uniform` none.
"""

from __future__ import annotations

import numpy as np

from .base import Floats, LayerView, Scorer


class KVzip(Scorer):
    name = "kvzip"
    paper = "KVzip, arXiv 2505.23416"
    needs_pairs = False
    keeps_scores = True
    ranks_after_reading = True

    def score(self, view: LayerView) -> Floats:
        newest = view.positions.max(initial=0)
        ages = (newest + 1 - view.positions).astype(np.float32)
        return np.where(view.positions < view.scored_until, view.kept, -ages)
