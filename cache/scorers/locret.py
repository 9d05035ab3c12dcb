"""What a small network on a token's query, key and value foretells matters (Locret, arXiv 2410.01805).

Departures: the network foretells the logarithm of the attention that a pair will be given, and that of the length of
its value is added. Much of the attention goes to pairs whose values are nearly nothing: an eighth of the pairs, chosen
by attention alone, had lost the needle here (as with `kvzip`, which says where the remedy comes from).
The paper's stabilizers, the last tokens of each chunk that stay whatever their score, are the window of the settings
here. Theirs end before the last chunk of a prompt, whose tokens compete for the budget: the question is in it. We read
the document before anybody has asked, so no chunk is known to be the last, and the next text continues the window.
"""

from __future__ import annotations

import numpy as np

from .base import Floats, LayerView
from .foretold import Foretold

LEAST_LENGTH = 1e-12  # of a value; 0 has no logarithm


class Locret(Foretold):
    name = "locret"
    paper = "Locret, arXiv 2410.01805"
    needs_value_norms = True

    def score(self, view: LayerView) -> Floats:
        scores: Floats = super().score(view) + np.log(np.maximum(view.value_norms, LEAST_LENGTH))
        return scores
