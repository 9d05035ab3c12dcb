"""One conversation in llama.cpp's cells: a sequence id, and which positions it holds.

Positions are the real ones: what was evicted leaves a gap. llama.cpp evicts whole tokens, over all layers and heads, so
a scorer's scores are averaged over these; the scorers are those of `satchel.cache.scorers`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ....cache import ArchiveOptions, CacheSettings, KVUsage
from ....cache.scorers import LayerView, find_scorer

if TYPE_CHECKING:
    from .engine import LlamaCppEngine

Positions = NDArray[np.int32]


@dataclass(eq=False)
class Family:
    """A conversation and its forks: together they may have ``limit_cells`` (0: no limit)."""

    limit_cells: int


@dataclass(frozen=True)
class Observed:
    """What scorers need: the cell of each held token [T], and the last queries after RoPE [L, W, H, D]."""

    cells: NDArray[np.int64]
    queries: NDArray[np.float32] | None = None
    query_positions: Positions | None = None
    scale: float = 0.0


class LlamaCppCache:
    """As `cache.KVCache`, for one engine's context. Made by the engine and by `fork`."""

    def __init__(
        self, engine: LlamaCppEngine, sequence: int, settings: CacheSettings, family: Family, *, hot_tokens: int | None
    ) -> None:
        self._engine = engine
        self._settings = settings
        self.sequence = sequence
        self.family = family
        self.hot_tokens = hot_tokens
        self.total_tokens = 0
        self.positions: Positions = np.empty(0, np.int32)
        self.observed: Observed | None = None
        self._dropped = weakref.finalize(self, engine.drop, sequence)
        self._dropped.atexit = False

    @property
    def closed(self) -> bool:
        return not self._dropped.alive

    @property
    def recalls(self) -> bool:
        return False

    @property
    def settings(self) -> CacheSettings:
        return self._settings

    @property
    def archive_options(self) -> ArchiveOptions | None:
        return None

    def close(self) -> None:
        """Gives the cells back, as far as no fork has them."""
        if self._dropped.detach():
            self._engine.release(self.sequence)

    def fork(self) -> LlamaCppCache:
        """Another conversation with the same past, in the same cells."""
        twin = LlamaCppCache(
            self._engine, self._engine.new_sequence(), self._settings, self.family, hot_tokens=self.hot_tokens
        )
        twin.total_tokens, twin.positions, twin.observed = self.total_tokens, self.positions, self.observed
        self._engine.copy(self, twin)
        return twin

    def forget_from(self, position: int) -> None:
        """Forgets all tokens at ``position`` and later, as if they had never been read."""
        self._engine.forget(self, position, -1)
        self.shorten(position)

    def shorten(self, position: int) -> None:
        """Notes that the tokens from ``position`` on are gone."""
        kept = int(np.searchsorted(self.positions, position))
        self.positions = self.positions[:kept]
        self.total_tokens = min(self.total_tokens, position)
        seen = self.observed
        if seen is None:
            return
        queries, asked = seen.queries, seen.query_positions
        if queries is not None and asked is not None:
            earlier = asked < position
            queries, asked = queries[:, earlier], asked[earlier]
        self.observed = Observed(seen.cells[:kept], queries, asked, seen.scale)

    def held_tokens(self) -> int:
        return len(self.positions)

    def usage(self) -> KVUsage:
        """Bytes of the keys and values that it holds, those that it shares with forks included."""
        return KVUsage(len(self.positions) * self._engine.cell_bytes(self._settings), len(self.positions),
                       self.total_tokens)  # fmt: skip

    def demote(self, hot_tokens: int | None = None) -> None:
        """Evicts all but ``hot_tokens`` tokens (None: its own budget): first ones, recent ones, and the best scored."""
        budget = self.hot_tokens if hot_tokens is None else hot_tokens
        if budget is None or len(self.positions) <= budget:
            return
        scores = self._scores()
        scores[: self._settings.sinks] = np.inf
        scores[max(len(scores) - self._settings.window, 0) :] = np.inf
        kept = np.sort(np.argpartition(scores, -budget)[-budget:])
        gone = np.setdiff1d(np.arange(len(scores)), kept)
        for first, end in _stretches(self.positions[gone]):
            self._engine.forget(self, first, end)
        self.positions = self.positions[kept]
        if self.observed is not None:
            seen = self.observed
            self.observed = Observed(seen.cells[kept], seen.queries, seen.query_positions, seen.scale)

    def sections(self) -> list[Any]:
        return self._engine.sections(self)

    def snapshot_bytes(self) -> int:
        return self._engine.state_bytes(self)

    def _scores(self) -> NDArray[np.float32]:
        """float32 [T], larger = keep: the mean over layers and heads."""
        scorer, seen = find_scorer(self._settings.scorer), self.observed
        if not scorer.needs_pairs:
            return self.positions.astype(np.float32)
        observer = self._engine.observer
        assert seen is not None
        assert observer is not None, "an engine whose scorer looks at keys"
        total = np.zeros(len(self.positions), np.float32)
        layers = self._engine.layers
        for layer in range(layers):
            keys = observer.keys(layer, seen.cells)
            queries = np.empty((0, 0, 0), np.float32) if seen.queries is None else seen.queries[layer]
            asked = np.empty(0, np.int32) if seen.query_positions is None else seen.query_positions
            positions = np.broadcast_to(self.positions, (len(keys), len(self.positions)))
            # the queries were turned already: no frequencies
            view = LayerView(keys, keys[..., 0, :0], positions, queries, asked, np.empty(0, np.float32), seen.scale)
            total += scorer.score(view).mean(axis=0)
        scores: NDArray[np.float32] = total / np.float32(layers)
        return scores


def _stretches(positions: Positions) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of consecutive positions."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for first, end in pairwise([0, *breaks.tolist(), len(positions)]):
        yield int(positions[first]), int(positions[end - 1]) + 1
