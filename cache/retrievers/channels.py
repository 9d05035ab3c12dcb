"""Every token's key in its 12 most important pairs of channels, after RoPE, in 4 bits: 14 bytes a token at any D >= 32.

Important is where keys differ most, times how much the queries that are at hand have there; chosen per KV head with the
first keys, then fixed. A block's score is the log of the mean over its tokens of exp(q.k), where the other channels are
those of the mean of all keys. Departures: pairs that RoPE turns together are chosen, so that a page can be turned (the
papers choose channels, or principal components before RoPE); blocks are recalled, not single tokens.
"""

from __future__ import annotations

from .base import Retriever


class Channels(Retriever):
    name = "channels"
    paper = "Double Sparsity, arXiv 2408.07092; Loki, arXiv 2406.02542"
    digest = 3
    channels = 12

    def digest_bytes_per_token(self, head_size: int) -> float:
        return min(self.channels, head_size // 2) + 2
