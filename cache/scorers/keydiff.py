"""Keys that differ from the others matter (KeyDiff, arXiv 2504.15364): minus the cosine to the mean direction."""

from __future__ import annotations

import numpy as np

from .base import Floats, LayerView, Scorer


class KeyDiff(Scorer):
    name = "keydiff"
    paper = "KeyDiff, arXiv 2504.15364"

    def score(self, view: LayerView) -> Floats:
        scores = np.empty(view.positions.shape, dtype=np.float32)
        for head, keys in enumerate(view.keys):  # one at a time: each step makes a copy
            directions = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
            anchor = directions.mean(axis=0)
            anchor /= np.maximum(np.linalg.norm(anchor), 1e-12)
            scores[head] = -(directions @ anchor)
        return scores
