"""Slow and obvious NumPy twin of the archive's recall: landmark digests, votes, the choice, and attention over it all.

All arithmetic is float64, one KV head at a time. ``kernels/native/{archive,attend,retriever}.cc`` are the native side.
Letters: T query tokens, H query heads, K KV heads, D head size, N archived tokens, S hot tokens, B blocks of 16 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .reference import Floats, Integers, apply_rope, attention, merge

BLOCK, PAGE_BLOCKS = 16, 16
PAGE = BLOCK * PAGE_BLOCKS
LONG_CHUNK, LONG_GROUP, SHORT_GROUP, VOTER_STRIDE = 48, 64, 4, 4


@dataclass(frozen=True)
class HeadPairs:
    """What one KV head has. ``hot_keys`` [S, D] are after RoPE, ``stored_keys`` [N, D] before it, as decoded."""

    hot_keys: ArrayLike
    hot_values: ArrayLike
    hot_positions: NDArray[Any]
    stored_keys: NDArray[Any]
    stored_values: NDArray[Any]
    landmarks: Floats  # [B, D], see `landmarks`; no rows: all votes are zero
    lost: Sequence[int] = ()  # blocks


@dataclass(frozen=True)
class Group:
    """Neighbouring queries of one KV head that recall together: tokens ``first`` to ``last`` - 1 of the chunk.

    ``margin``: by what part the last chosen block's vote is larger than the first refused one's (inf: no contest).
    """

    kv_head: int
    first: int
    last: int
    blocks: Integers
    margin: float


@dataclass(frozen=True)
class Recall:
    """The settings of an archive and of attention that its twin needs."""

    sinks: int
    recall_tokens: int
    frequencies: ArrayLike
    scale: float
    attention_factor: float = 1.0
    reach: int = 0
    softcap: float = 0.0
    groups: list[Group] = field(default_factory=list)
    """Filled by `attend`."""

    def first_seen(self, last: int) -> int:
        """Where the sinks lie for a chunk whose last query is at ``last``."""
        return max(0, last + 1 - self.reach) if self.reach else 0

    def seen_positions(self, blocks: Sequence[int] | Integers, last: int) -> list[int]:
        """First positions of recalled ``blocks`` (ascending): their own, or in order behind the moved sinks."""
        places, least = [], self.first_seen(last) + self.sinks
        for block in blocks:
            places.append(max(least, int(block) * BLOCK))
            least = places[-1] + BLOCK
        return places

    def votes(self, queries: Floats, log_mass: Floats, landmarks: Floats, last: int) -> Floats:
        """What each block [B] gets of the softmax of ``queries`` [R, D] (after RoPE), summed over them.

        A landmark stands for 16 tokens; ``log_mass`` [R] is the log-sum-exp of what is attended anyway.
        """
        start = self.first_seen(last)
        logits = np.zeros((len(queries), len(landmarks)))
        for block, landmark in enumerate(landmarks):
            page = max(block // PAGE_BLOCKS * PAGE, start + self.sinks if start else 0)
            turned = apply_rope(landmark[None, None], [page], self.frequencies)[0, 0]
            logits[:, block] = self.scale * queries @ turned
        logits += np.log(BLOCK)
        total = np.logaddexp(np.logaddexp.reduce(logits, axis=1), log_mass)
        shares: Floats = np.exp(logits - total[:, None]).sum(axis=0)
        return shares

    def choose(self, votes: Floats, lost: Sequence[int]) -> tuple[Integers, float]:
        """The blocks (ascending) with the largest votes; of equal ones the later."""
        candidates = np.array([b for b in range(self.sinks // BLOCK, votes.size) if b not in lost], np.int64)
        wanted = self.recall_tokens // BLOCK
        order = candidates[np.lexsort((-candidates, -votes[candidates]))]
        chosen, refused = order[:wanted], order[wanted:]
        if not (chosen.size and refused.size):
            return np.sort(chosen), np.inf
        worst, best = votes[chosen[-1]], votes[refused[0]]
        return np.sort(chosen), float((worst - best) / worst) if worst > 0 else 0.0

    def attend(self, q: ArrayLike, positions: NDArray[Any], heads: Sequence[HeadPairs]) -> Floats:
        """Output [T, H, D] of queries [T, H, D] (before RoPE); the hot tier has the chunk's own pairs already."""
        queries = apply_rope(q, positions, self.frequencies, self.attention_factor)
        tokens, count, size = queries.shape
        group, last = count // len(heads), int(positions[-1])
        each, stride = (LONG_GROUP, VOTER_STRIDE) if tokens > LONG_CHUNK else (SHORT_GROUP, 1)
        out = np.zeros((tokens, count, size))
        self.groups.clear()
        for kv, head in enumerate(heads):
            mine = slice(kv * group, (kv + 1) * group)
            always = merge([self._hot(queries[:, mine], positions, head), self._sinks(queries[:, mine], last, head)])
            for first in range(0, tokens, each):
                rows = slice(first, min(tokens, first + each))
                voters = queries[rows, mine][::stride].reshape(-1, size)
                mass = always[1][rows][::stride].ravel()
                votes = np.zeros(len(head.stored_keys) // BLOCK)
                if len(head.landmarks):
                    votes = self.votes(voters, mass, head.landmarks, last)
                blocks, margin = self.choose(votes, head.lost)
                self.groups.append(Group(kv, rows.start, rows.stop, blocks, margin))
                parts = [(always[0][rows], always[1][rows]), self._recalled(queries[rows, mine], blocks, last, head)]
                out[rows, mine] = merge(parts)[0]
        return out

    def _over(
        self, q: Floats, keys: ArrayLike, values: ArrayLike, places: ArrayLike, at: ArrayLike
    ) -> tuple[Floats, Floats]:
        one = [np.asarray(keys)], [np.asarray(values)]
        return attention(q, *one, at, [np.asarray(places)], scale=self.scale, softcap=self.softcap)

    def _hot(self, q: Floats, positions: NDArray[Any], head: HeadPairs) -> tuple[Floats, Floats]:
        return self._over(q, head.hot_keys, head.hot_values, head.hot_positions, positions)

    def _sinks(self, q: Floats, last: int, head: HeadPairs) -> tuple[Floats, Floats]:
        return self._stored(q, np.arange(self.sinks), self.first_seen(last) + np.arange(self.sinks), head)

    def _recalled(self, q: Floats, blocks: Integers, last: int, head: HeadPairs) -> tuple[Floats, Floats]:
        tokens = (np.asarray(blocks)[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        places = np.repeat(self.seen_positions(blocks, last), BLOCK) + np.arange(tokens.size) % BLOCK
        return self._stored(q, tokens, places, head)

    def _stored(self, q: Floats, tokens: Integers, places: Integers, head: HeadPairs) -> tuple[Floats, Floats]:
        """Attention over archived ``tokens`` as if they lay at ``places``; those that are hot as well are left out."""
        seen = ~np.isin(tokens, head.hot_positions)
        tokens, places = tokens[seen], places[seen].astype(np.int64)
        keys = apply_rope(head.stored_keys[tokens][:, None], places, self.frequencies, self.attention_factor)[:, 0]
        everywhere = np.zeros(len(tokens), np.int64)  # older than every query
        return self._over(q, keys, head.stored_values[tokens], everywhere, np.zeros(len(q), np.int64))


def landmarks(keys: ArrayLike, calibrated: int, sinks: int, frequencies: ArrayLike, factor: float = 1.0) -> Floats:
    """[B, D] of one KV head's ``keys`` [N, D] before RoPE: the mean of each block in the frame of its page, in 8 bits.

    Keys turn by their distance from the first token of their page of 256. What is rounded is the difference to the
    mean of the first ``calibrated`` keys (without the sinks), turned in the same way.
    """
    given = np.asarray(keys, np.float64)
    frame = np.arange(PAGE)
    sample = given[sinks if sinks < calibrated else 0 : calibrated].mean(axis=0)
    center = apply_rope(np.tile(sample, (PAGE, 1, 1)), frame, frequencies, factor)[:, 0]
    turned = apply_rope(given[:, None], np.arange(len(given)) % PAGE, frequencies, factor)[:, 0]
    means = turned.reshape(-1, BLOCK, given.shape[1]).mean(axis=1)
    centers = center.reshape(PAGE_BLOCKS, BLOCK, -1).mean(axis=1)[np.arange(len(means)) % PAGE_BLOCKS]
    rest = means - centers
    scales = np.abs(rest).max(axis=1, keepdims=True) / 127
    found: Floats = np.rint(rest / np.where(scales > 0, scales, 1.0)) * scales + centers
    return found
