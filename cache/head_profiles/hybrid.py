"""LongGen's hybrid: whole layers, one in three of which sees everything."""

from __future__ import annotations

import numpy as np

from .base import Floats, HeadProfile, Marks

SHARE = 3


class Hybrid(HeadProfile):
    """The middle third of the layers sees everything.

    Departure: the paper trains the model on for this; here it is told nothing. Which third it takes is our guess.
    """

    name = "hybrid"
    paper = "LongGen, arXiv 2410.01485"
    calibrated = False

    def streaming(self, sees_all: Marks, kv_heads: int, scores: Floats | None, percent: int) -> Marks:
        del scores, percent
        layers = np.flatnonzero(sees_all)
        kept = -(-layers.size // SHARE)
        first = (layers.size - kept) // 2
        marks = sees_all.copy()
        marks[layers[first : first + kept]] = False
        return np.repeat(marks[:, None], kv_heads, axis=1)
