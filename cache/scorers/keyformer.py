"""H2O with noise (Keyformer, arXiv 2403.09054): attention mass of softmax((logits + Gumbel noise) / temperature).

What was dropped is missing in every later softmax, which then favours what is left; noise on the logits and a
temperature that rises from 1 to 2 take the certainty out of that. Mass is kept between prunings as in `h2o`.

Departures beside those of H2O: the noise of a pair is drawn from its position [K, T], so that it is the same for every
query and head, and for every run, fork and opened snapshot; and the temperature rises with the share of the text that
is no longer held, as there is no length of the answer to count towards while a document is read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .base import Floats, LayerView, Scorer
from .h2o import OBSERVED, new_mass

COLDEST, HOTTEST = 1.0, 2.0
SEED = 0x9E3779B97F4A7C15


class Keyformer(Scorer):
    name = "keyformer"
    paper = "Keyformer, arXiv 2403.09054"
    observed_queries = OBSERVED
    keeps_scores = True

    @classmethod
    def scoring_bytes_per_token(cls, kv_heads: int, head_size: int) -> int:
        """And the noise, with the numbers of 8 bytes that it is made from."""
        return super().scoring_bytes_per_token(kv_heads, head_size) + 5 * 8 * kv_heads

    def score(self, view: LayerView) -> Floats:
        return view.kept + new_mass(view, bias=gumbel_noise(view.positions), temperature=temperature(view))


def temperature(view: LayerView) -> float:
    """`COLDEST` while everything is held, towards `HOTTEST` the less it is."""
    if not view.query_positions.size:
        return COLDEST
    held: float = view.positions.shape[1] / (int(view.query_positions[-1]) + 1)
    return COLDEST + (HOTTEST - COLDEST) * max(0.0, 1.0 - held)


def gumbel_noise(positions: NDArray[np.int32]) -> Floats:
    """Standard Gumbel noise, float32 of the same shape; the same for the same position."""
    bits = positions.astype(np.uint64) * np.uint64(2) + np.uint64(1)
    bits = (bits * np.uint64(SEED)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finalizer of SplitMix64
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    noise: Floats = -np.log(-np.log(uniform))
    return noise.astype(np.float32)
