"""Blocks of alike tokens instead of neighbours, and the mean key of each, in 8 bits: 6 bytes a token at D = 64.

The 256 tokens of a page are grouped by the direction of their keys after RoPE into 16 clusters of exactly 16; each is
stored as a block, and scored as a landmark is. Departures: clusters are of equal size and stay inside a page, so that
blocks are read whole, nothing written is ever moved, and what comes later needs no new clustering; as many blocks as
``recall_tokens`` says are attended, not all above a calibrated threshold; there is one level, no tree above it.
"""

from __future__ import annotations

from .base import Retriever


class Centroid(Retriever):
    name = "centroid"
    paper = "Squeezed Attention, arXiv 2411.09688"
    digest = 4
    step_tokens = 256

    def digest_bytes_per_token(self, head_size: int) -> float:
        return (16 * head_size + 4 * head_size + 256) / 256  # codes; offsets and scales of channels; the tokens' order
