"""Attention-Gate's heads (arXiv 2410.12876): what a pair will be worth, told from its token's query, key and value and
from the tokens that are read with it, by a small attention of their own (`gate_head`)."""

from __future__ import annotations

from functools import partial

from .gate_head import SETTINGS, held_out_figures, trained_gate
from .labels import WorthOfPairs
from .retention import ATTENTION_GATE, pair_features
from .training import Recipe, calibrate_trained

RECIPE = Recipe(
    ATTENTION_GATE, "Attention-Gate, arXiv 2410.12876", WorthOfPairs, pair_features, trained_gate, held_out_figures,
    SETTINGS,
)  # fmt: skip
calibrate_attention_gate = partial(calibrate_trained, RECIPE)
