"""What a merger is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Indices = NDArray[np.int32]


@dataclass(frozen=True)
class Merged:
    """Pairs that have taken others in: ``tokens`` int32 [M] ascending, among those that were given, with their new
    ``keys`` and ``values`` float32 [M, D]."""

    tokens: Indices
    keys: Floats
    values: Floats


class Merger(ABC):
    """Puts forgotten pairs of one KV head into others that stay."""

    name: ClassVar[str]
    paper: ClassVar[str]

    @classmethod
    @abstractmethod
    def merging_bytes_per_token(cls, head_size: int) -> int:
        """Working memory for each token of a KV head, one head at a time."""

    @abstractmethod
    def merge(self, keys: Floats, values: Floats, targets: Indices, forgotten: Indices) -> Merged:
        """``keys`` (after RoPE) and ``values`` float32 [T, D] of a head before it is pruned; ``targets`` and
        ``forgotten``: ascending indices of tokens that may take others in, and of those that go. Positions stay."""
