"""What a scorer is, and what it may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LayerView:
    """One layer of the cache after a chunk. Letters: K KV heads, H query heads, T tokens, D head size, W queries.

    ``keys`` (after RoPE) float32 [K, T, D] (D is 0 when the scorer does not need them);
    ``value_norms`` float32 [K, T], the lengths of the values ([K, 0] when it does not need them);
    ``positions`` int32 [K, T], ascending in each head;
    ``queries`` (before RoPE) float32 [W, H, D] at ``query_positions`` int32 [W], the last ones of the chunk, as many
    as the scorer declares; ``frequencies`` float32 [rotated dimensions / 2], radians per position; ``scale`` of the
    logits. ``retention`` float32 [K, T]: what the graph's heads said each pair will be worth, the more the better (None
    when the scorer does not need it).

    For scorers that keep scores: ``kept`` float32 [K, T], what they gave each pair the last time, 0 for new ones; it
    counts the queries before the position ``scored_until``.
    """

    keys: Floats
    value_norms: Floats
    positions: NDArray[np.int32]
    queries: Floats
    query_positions: NDArray[np.int32]
    frequencies: Floats
    scale: float
    kept: Floats = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    scored_until: int = 0
    retention: Floats | None = None


class Scorer(ABC):
    """Ranks the pairs of one layer."""

    name: ClassVar[str]
    paper: ClassVar[str]
    observed_queries: ClassVar[int] = 0
    """How many of a chunk's last queries the view must hold."""
    needs_pairs: ClassVar[bool] = True
    """Whether it looks at keys (copying them out costs time)."""
    needs_value_norms: ClassVar[bool] = False
    """Whether it asks how long values are."""
    keeps_scores: ClassVar[bool] = False
    """Whether the view must hold what it gave the pairs the last time: the cache then keeps that, in forks and
    snapshots, too."""
    needs_retention: ClassVar[bool] = False
    """Whether it looks at what the graph's retention heads say; the package must be calibrated for its name then."""

    ranks_after_reading: ClassVar[bool] = False
    """Whether it ranks a text that was read whole, once, by what reading it again tells: nothing is forgotten before
    that, and scores are kept as with `keeps_scores`."""

    @classmethod
    def scoring_bytes_per_token(cls, kv_heads: int, head_size: int) -> int:
        """Working memory for each token of a layer: the copies of the view, and rows of logits as wide as the layer."""
        copies = kv_heads + 3  # one more head's keys and values on their way, and scaled keys
        # Of scores; kept ones, and how often each pair was seen; lengths of values, and what comes of them.
        rows = 4 + 6 * cls.keeps_scores + 3 * cls.needs_value_norms
        return 4 * (copies * head_size * cls.needs_pairs + 3 * cls.observed_queries + rows * kv_heads)

    @classmethod
    def kept_bytes_per_token(cls, kv_heads: int) -> int:
        """Memory for each token of every layer, between two prunings: its score and position."""
        return 8 * kv_heads if cls.keeps_scores else 0

    @abstractmethod
    def score(self, view: LayerView) -> Floats:
        """float32 [K, T], larger = keep. Only the order within a head counts."""


def rotate(x: Floats, positions: NDArray[np.int32], frequencies: Floats) -> Floats:
    """Half-split rotary embedding of ``x`` [T, H, D] at ``positions`` [T]."""
    half = frequencies.size
    angles = positions[:, None].astype(np.float64) * frequencies.astype(np.float64)
    cos = np.cos(angles).astype(np.float32)[:, None, :]
    sin = np.sin(angles).astype(np.float32)[:, None, :]
    first, second = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], axis=-1)
