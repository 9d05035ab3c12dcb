"""What a small attention over the tokens that are read together foretells matters (Attention-Gate, arXiv 2410.12876).

Departures: the paper's gate sees the whole prompt and flags what to evict; ours sees the chunk that is being read (an
answer's token sees itself), as earlier chunks are evicted already, and ranks: the budget says how many stay.
"""

from __future__ import annotations

from .foretold import Foretold


class AttentionGate(Foretold):
    name = "attention-gate"
    paper = "Attention-Gate, arXiv 2410.12876"
