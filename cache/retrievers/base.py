"""What a retriever is: a digest of every archived block, and how queries are scored against it (in native code)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar


class Retriever(ABC):
    """``digest`` is the native kind (kernels/native/retriever.h). D is the head size.

    A query's softmax over what the digests promise says how much of its attention each block of 16 tokens would get;
    the blocks with the largest sum over a group of queries are recalled. Digests see keys after RoPE, turned to the
    first position of their page of 256 tokens: a page can be scored wherever it is to be attended.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    digest: ClassVar[int]
    channels: ClassVar[int] = 0
    """Pairs of channels that are looked at, by a digest that chooses some."""
    step_tokens: ClassVar[int] = 64
    """Pairs are archived in steps of so many tokens: a page of the hot tier, or of digests."""

    @abstractmethod
    def digest_bytes_per_token(self, head_size: int) -> float:
        """Memory of one KV head for each archived token, in whole pages; not a whole number."""
