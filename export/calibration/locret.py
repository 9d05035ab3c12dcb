"""Locret's retaining heads (arXiv 2410.01805): what a pair will be worth, told from the token's query, key and value,
by a small network (`retaining_head`)."""

from __future__ import annotations

from functools import partial

from .labels import AnswerAttention
from .retaining_head import SETTINGS, held_out_figures, trained_head
from .retention import LOCRET, pair_features
from .training import Recipe, calibrate_trained

RECIPE = Recipe(
    LOCRET, "Locret, arXiv 2410.01805", AnswerAttention, pair_features, trained_head, held_out_figures, SETTINGS
)
calibrate_locret = partial(calibrate_trained, RECIPE)
