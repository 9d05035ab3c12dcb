"""Sinks and window (StreamingLLM, arXiv 2309.17453): the newest matter most. The cache keeps the sinks by itself."""

from __future__ import annotations

import numpy as np

from .base import Floats, LayerView, Scorer


class Recency(Scorer):
    name = "recency"
    paper = "StreamingLLM, arXiv 2309.17453"
    needs_pairs = False

    def score(self, view: LayerView) -> Floats:
        return view.positions.astype(np.float32)
