"""The least and the largest number of every channel in a block, after RoPE, in 8 bits: 8.5 bytes a token at D = 64.

A block's score is the most that a key within these bounds gives: the sum over channels of max(q * least, q * most).
Departures: bounds are codes of 8 bits, rounded outward so that they hold; a softmax over the scores lets queries vote.
"""

from __future__ import annotations

from .base import Retriever


class MinMax(Retriever):
    name = "minmax"
    paper = "Quest, arXiv 2406.10774"
    digest = 2

    def digest_bytes_per_token(self, head_size: int) -> float:
        return (2 * head_size + 8) / 16
