"""Keys of small norm matter (Devoto et al., arXiv 2406.11430): the score is minus the key's length.

Keys whose L2 norm is small are those that later queries attend to most, so no query is needed. Rotary positions do not
change lengths: keys [K, T, D] are taken as they are. The paper leaves the first two layers alone, where this is not
so; a scorer does not know which layer it sees, and all are pruned here.
"""

from __future__ import annotations

import numpy as np

from .base import Floats, LayerView, Scorer


class KNorm(Scorer):
    name = "knorm"
    paper = "L2 norm of keys, arXiv 2406.11430"

    def score(self, view: LayerView) -> Floats:
        return -np.stack([np.linalg.norm(keys, axis=-1) for keys in view.keys])  # a head at a time: each makes a copy
