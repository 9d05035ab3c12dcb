"""No digests and no recall: what left the hot tier is kept, but attended only when it comes back."""

from __future__ import annotations

from .base import Retriever


class Nothing(Retriever):
    name = "none"
    paper = "StreamingLLM, arXiv 2309.17453 (sinks and a window)"
    digest = 0

    def digest_bytes_per_token(self, head_size: int) -> float:
        del head_size
        return 0.0
