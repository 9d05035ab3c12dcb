"""Keys that differ from the others matter (KeyDiff, arXiv 2504.15364): minus the cosine to the mean direction."""

from __future__ import annotations

import numpy as np

from .base import Floats, LayerView, Scorer


class KeyDiff(Scorer):
    name = "keydiff"
    paper = "KeyDiff, arXiv 2504.15364"

    def score(self, view: LayerView) -> Floats:
        norms = np.linalg.norm(view.keys, axis=-1, keepdims=True)
        directions = view.keys / np.maximum(norms, 1e-12)
        anchor = directions.mean(axis=1, keepdims=True)
        anchor /= np.maximum(np.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        cosines: Floats = np.einsum("ktd,kod->kt", directions, anchor, optimize=True)
        return -cosines
