"""The mean key of every block of 16 tokens, after RoPE, in 8 bits: 4.25 bytes a token at D = 64.

Codes hold the difference to what the mean of all keys would be at the block's place, with one scale for each block.
"""

from __future__ import annotations

from .base import Retriever


class Landmark(Retriever):
    name = "landmark"
    paper = "ShadowKV, arXiv 2410.21465; InfLLM, arXiv 2402.04617"
    digest = 1

    def digest_bytes_per_token(self, head_size: int) -> float:
        return (head_size + 4) / 16
