"""The mean key of every block of 16 tokens, after RoPE, in 8 bits: 4.25 bytes a token at D = 64.

A query's softmax over all landmarks says how much of its attention each block would get; blocks are chosen for a KV
head by the largest share that any of its queries gives (a question), or by their sum (a chunk of the document).
"""

from __future__ import annotations

from .base import Retriever


class Landmark(Retriever):
    name = "landmark"
    paper = "ShadowKV, arXiv 2410.21465; InfLLM, arXiv 2402.04617"
    digest = 1

    def digest_bytes_per_token(self, head_size: int) -> float:
        return (head_size + 4) / 16
