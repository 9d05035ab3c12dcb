"""Scorers: how much each cached pair matters. One file per method; a new one is a file here and a row in the table.

``find_scorer`` makes one by name; tests/cache/test_scorers.py runs the same checks over all of them.
"""

from __future__ import annotations

from .actqkv import ActQKV
from .attention_gate import AttentionGate
from .base import Floats, LayerView, Scorer
from .expected_attention import ExpectedAttention
from .finch import Finch
from .h2o import H2O
from .keydiff import KeyDiff
from .keyformer import Keyformer
from .knorm import KNorm
from .kvzap import KVzap
from .kvzip import KVzip
from .locret import Locret
from .recency import Recency
from .snapkv import SnapKV

_SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer
    for scorer in (
        Recency, KeyDiff, SnapKV, ExpectedAttention, H2O, Keyformer, Finch, ActQKV, KNorm, KVzap, KVzip, Locret,
        AttentionGate,
    )
}


def scorer_names() -> tuple[str, ...]:
    """The names of all scorers."""
    return tuple(_SCORERS)


def find_scorer(name: str) -> Scorer:
    """A new scorer; KeyError for a name that `scorer_names` does not list (settings are checked before)."""
    return _SCORERS[name]()


__all__ = ["Floats", "LayerView", "Scorer", "find_scorer", "scorer_names"]
