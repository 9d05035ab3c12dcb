"""Ranks a layer's pairs: what the scorer is shown of them, and the scores that some keep from one time to the next.

Kept scores go by position, so that they stay with their pairs whatever the native cache does: pruning, rolling back,
dropping what has left a window, bringing pairs back from the archive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from .scorers import Floats, LayerView, Scorer
from .snapshots.layout import RAW
from .snapshots.snapshot import Snapshot
from .snapshots.state import SectionToWrite, unusable

END_OF_POSITIONS = int(np.iinfo(np.int32).max)
_NUMBER = np.dtype("<u4")
_PAIR = np.dtype([("position", "<i4"), ("score", "<f4")])


@dataclass(frozen=True)
class _Kept:
    """Of one KV head: ``positions`` int32 [T] ascending, their ``scores`` float32 [T], which count the queries before
    the position ``until``."""

    until: int
    positions: NDArray[np.int32]
    scores: Floats

    def at(self, positions: NDArray[np.int32]) -> Floats:
        """float32 of the same shape; 0 where there is none."""
        places = np.searchsorted(self.positions, positions)
        found = np.zeros(positions.shape, dtype=np.float32)
        known = places < self.positions.size
        known[known] = self.positions[places[known]] == positions[known]
        found[known] = self.scores[places[known]]
        return found

    def only(self, which: NDArray[np.bool_]) -> _Kept:
        return _Kept(self.until, self.positions[which], self.scores[which])


_NOTHING = _Kept(0, np.empty(0, np.int32), np.empty(0, np.float32))


class Ranking:
    """The scorer of one conversation, and what it keeps. K KV heads of size D; ``scale`` of the logits."""

    def __init__(self, scorer: Scorer, kv_heads: int, head_size: int, scale: float) -> None:
        self._scorer = scorer
        self._kv_heads, self._head_size, self._scale = kv_heads, head_size, scale
        self._kept: dict[tuple[int, int], _Kept] = {}  # by layer and KV head

    def fork(self) -> Ranking:
        """The same scores, from here on apart."""
        twin = Ranking(self._scorer, self._kv_heads, self._head_size, self._scale)
        twin._kept = dict(self._kept)
        return twin

    def rank(self, native: kernels.KVCache, layer: int, head: int | None = None) -> tuple[LayerView, Floats]:
        """The view of all KV heads, which must hold equally many tokens, or of ``head`` alone, and its scores
        float32 [K, T] or [1, T]."""
        view = self.view(native, layer, head)
        scores = self._scorer.score(view)
        if self._scorer.keeps_scores and not self._scorer.ranks_after_reading:
            first = head or 0
            until = int(view.query_positions[-1]) + 1 if view.query_positions.size else view.scored_until
            for row in range(len(scores)):
                kept = _Kept(max(until, view.scored_until), view.positions[row], scores[row].copy())
                self._kept[layer, first + row] = kept
        return view, scores

    @property
    def until(self) -> int:
        """Scores that are kept count the queries before this position; 0: there are none."""
        return max((kept.until for kept in self._kept.values()), default=0)

    def keep(self, layer: int, head: int, first: int, scores: Floats) -> None:
        """Gives the pairs at positions ``first`` and on, of one KV head, ``scores`` [T] that were found elsewhere. What
        was kept of later positions is forgotten."""
        known = self._kept.get((layer, head))
        before = known.only(known.positions < first) if known else _NOTHING
        end = first + scores.size
        self._kept[layer, head] = _Kept(
            end,
            np.concatenate([before.positions, np.arange(first, end, dtype=np.int32)]),
            np.concatenate([before.scores, scores.astype(np.float32)]),
        )

    def view(self, native: kernels.KVCache, layer: int, head: int | None = None) -> LayerView:
        """What the scorer is shown, as in `rank`."""
        heads = range(self._kv_heads) if head is None else range(head, head + 1)
        scorer, tokens = self._scorer, native.tokens(layer, heads[0])
        keys = np.empty((len(heads), tokens, self._head_size if scorer.needs_pairs else 0), dtype=np.float32)
        positions = np.empty((len(heads), tokens), dtype=np.int32)
        for row, kv_head in enumerate(heads):
            if not scorer.needs_pairs:
                positions[row] = native.positions(layer, kv_head)
                continue
            keys[row], _, positions[row] = native.read(layer, kv_head)
        norms = np.empty((len(heads), tokens if scorer.needs_value_norms else 0), dtype=np.float32)
        if scorer.needs_value_norms:
            norms[:] = [native.value_norms(layer, kv_head, 0, END_OF_POSITIONS) for kv_head in heads]
        queries, query_positions = native.observed(layer)
        group = queries.shape[1] // self._kv_heads
        queries = queries[:, heads[0] * group : (heads[-1] + 1) * group]
        kept, until = self._kept_of(layer, heads, positions)
        retention = None
        if scorer.needs_retention:
            retention = np.stack([native.retention(layer, kv_head) for kv_head in heads])
        return LayerView(
            keys, norms, positions, queries, query_positions, native.frequencies(layer), self._scale, kept, until,
            retention,
        )  # fmt: skip

    def _kept_of(self, layer: int, heads: range, positions: NDArray[np.int32]) -> tuple[Floats, int]:
        if not self._scorer.keeps_scores:
            return np.zeros((0, 0), dtype=np.float32), 0
        found = [self._kept.get((layer, head)) for head in heads]
        rows = [kept.at(places) if kept else np.zeros(places.shape, dtype=np.float32)
                for kept, places in zip(found, positions, strict=True)]  # fmt: skip
        return np.stack(rows), found[0].until if found[0] else 0

    def forget_dropped(self, native: kernels.KVCache) -> None:
        """Forgets the scores of pairs that the hot tier no longer has."""
        for (layer, head), kept in self._kept.items():
            self._kept[layer, head] = kept.only(np.isin(kept.positions, native.positions(layer, head)))

    def forget_from(self, position: int) -> None:
        """The tokens at ``position`` and later were never read. What their queries gave to earlier ones stays."""
        for key, kept in self._kept.items():
            earlier = kept.only(kept.positions < position)
            self._kept[key] = _Kept(min(kept.until, position), earlier.positions, earlier.scores)

    # --- Snapshots -----------------------------------------------------------------------------------------------

    def sections(self) -> list[SectionToWrite]:
        """One for each layer with scores; docs/snapshot-format.md has the bytes."""
        layers = sorted({layer for layer, _ in self._kept})
        return [(self._section(layer), self._pieces(layer), RAW) for layer in layers]

    def saved_bytes(self) -> int:
        """Bytes of all `sections`."""
        pairs = sum(kept.positions.size for kept in self._kept.values())
        layers = len({layer for layer, _ in self._kept})
        return 2 * _NUMBER.itemsize * layers * self._kv_heads + _PAIR.itemsize * pairs

    def restore(self, snapshot: Snapshot, layers: int, total_tokens: int) -> None:
        """Takes what a scorer of the same name has saved. Raises SnapshotError."""
        for layer in range(layers) if self._scorer.keeps_scores else ():
            name = self._section(layer)
            if name not in snapshot.sections:
                continue
            data, at = snapshot.section(name), 0
            for head in range(self._kv_heads):
                kept, at = _parsed(data, at, total_tokens) or (None, at)
                if kept is None:
                    raise unusable(snapshot, f"the scores of its layer {layer} are damaged")
                self._kept[layer, head] = kept
            if at != len(data):
                raise unusable(snapshot, f"the scores of its layer {layer} have bytes left over")

    def _section(self, layer: int) -> str:
        return f"scores-{self._scorer.name}-{layer:03}"

    def _pieces(self, layer: int) -> Iterator[bytes]:
        for head in range(self._kv_heads):
            kept = self._kept.get((layer, head), _NOTHING)  # which a streaming head has
            pairs = np.empty(kept.positions.size, dtype=_PAIR)
            pairs["position"], pairs["score"] = kept.positions, kept.scores
            yield np.array([kept.positions.size, kept.until], dtype=_NUMBER).tobytes() + pairs.tobytes()


def _parsed(data: memoryview, at: int, total_tokens: int) -> tuple[_Kept, int] | None:
    """One head's scores, and where they end; None: they are damaged."""
    begin = at + 2 * _NUMBER.itemsize
    if begin > len(data):
        return None
    count, until = (int(number) for number in np.frombuffer(data[at:begin], dtype=_NUMBER))
    end = begin + count * _PAIR.itemsize
    if end > len(data) or until > total_tokens:
        return None
    pairs = np.frombuffer(data[begin:end], dtype=_PAIR)
    positions, scores = pairs["position"].astype(np.int32), pairs["score"].astype(np.float32)
    ends = positions.size and (positions[0] < 0 or positions[-1] >= total_tokens)
    if ends or (np.diff(positions) <= 0).any() or not np.isfinite(scores).all():
        return None
    return _Kept(until, positions, scores), end
