"""What a retriever is: a digest of every archived block, and how queries are scored against it (in native code)."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar


class Retriever(ABC):
    """``digest`` is the native kind: 1 the mean key of a block. D is the head size."""

    name: ClassVar[str]
    paper: ClassVar[str]
    digest: ClassVar[int]
    channels: ClassVar[int] = 0

    def digest_bytes_per_token(self, head_size: int) -> float:
        """Memory of one KV head for each archived token."""
        raise NotImplementedError
