"""Plans with an archive: a small hot tier, and everything else encoded, in RAM or on flash, called back on demand."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .plan import (
    ARCHIVE_PAGE_TOKENS,
    CHUNKS,
    ArchiveCost,
    Costs,
    Need,
    Placement,
    Plan,
    Room,
    Wishes,
)

# Tokens per KV head, least and most; measured in docs/lab-notes.md. Recalled tokens are what quality depends on, and
# they cost hardly any memory: those on disk are read and attended to a part at a time, by every thread.
SINKS, WINDOW = (16, 64), (112, 1024)
LAST_WINDOW, LAST_CHUNK = 80, 32  # one hot page fewer than with the least window, and slower to read
RECALL_TOKENS, RECALL_PART_TOKENS = 4096, 1024
RUNGS = 16


@dataclass(frozen=True)
class Split:
    """How the hot tier is used: tokens per KV head, and tokens read at a time."""

    chunk: int
    sinks: int
    window: int
    hot_tokens: int
    recall_tokens: int
    step_tokens: int

    @property
    def capacity_tokens(self) -> int:
        """Hot at once: what has just left the window waits until it can be archived in one step."""
        return self.hot_tokens + self.step_tokens - 1 + self.chunk

    def fork_bytes(self, costs: Costs) -> int:
        """Hot pages of a fork, beyond what a conversation may hold, once it shares none with what it was forked from.

        That one goes on holding its window and what waits to be archived, and there is a page that was copied for the
        fork. The sinks of both are in the archive. These bytes are of the process, not of one conversation's budget.
        """
        pages = costs.pages(self.hot_tokens - self.sinks + self.step_tokens - 1) + 1
        return pages * costs.kv_bytes_per_page + costs.window_fork_bytes


@dataclass(frozen=True)
class _Work:
    """What is planned: so many tokens now, up to so many later, with so much disk."""

    costs: Costs
    room: Room
    tokens: int
    longest_tokens: int
    disk_bytes: int


def splits(wishes: Wishes, step_tokens: int) -> list[Split]:
    """From the roomiest to the tightest: sinks and window shrink, and the chunk with them.

    A chunk is no longer than the window, which is all that its first token sees in full beside the sinks. Before the
    window shrinks a step, half of its chunk is tried.
    """
    ladder = []
    for step in range(RUNGS, -1, -1):
        rung = _rung(step / RUNGS, wishes, step_tokens)
        ladder.append(rung)
        if wishes.chunk is None and rung.chunk > CHUNKS[-1]:
            ladder.append(replace(rung, chunk=rung.chunk // 2))
    return list(dict.fromkeys(ladder))


def last_resort(wishes: Wishes, step_tokens: int) -> list[Split]:
    """Tighter than all `splits`, where a person leaves the choice."""
    if wishes.chunk or wishes.window or wishes.hot_tokens:
        return []
    rung = _rung(0, wishes, step_tokens)
    return [replace(rung, chunk=LAST_CHUNK, window=LAST_WINDOW, hot_tokens=rung.sinks + LAST_WINDOW)]


def archive_plan(
    costs: Costs, room: Room, tokens: int, longest_tokens: int, wishes: Wishes, disk_bytes: int
) -> Plan | None:  # fmt: skip
    """The best plan with an archive, or None. Codecs and retrievers by quality; RAM before disk; of each one the
    roomiest split."""
    work = _Work(costs, room, tokens, longest_tokens, disk_bytes)
    for ladder in (splits, last_resort):
        for cost in costs.archive:
            for place in (_warm, _on_disk):
                for split in ladder(wishes, cost.step_tokens):
                    if plan := place(work, split, cost):
                        return plan
    return None


def archive_needs(costs: Costs, tokens: int, wishes: Wishes, disk_bytes: int) -> list[Need]:
    """What each way to read with an archive takes at least."""
    found = []
    for cost in costs.archive:
        for split in (*splits(wishes, cost.step_tokens), *last_resort(wishes, cost.step_tokens)):
            held, windows = split.capacity_tokens, costs.window_bytes(split.chunk)
            fixed = sum(size for _, size in _scored(costs, split).rows(split.chunk, held, windows))
            pages = _pages(tokens, split)
            for archived in _least_archived(cost, costs, pages, split, disk_bytes):
                more = archived + pages * cost.digest_page_bytes
                kv_bytes = costs.kv_bytes(held) + windows + more
                found.append(Need(fixed + more + split.fork_bytes(costs), kv_bytes))
    return found


def _least_archived(
    cost: ArchiveCost, costs: Costs, pages: int, split: Split, disk_bytes: int
) -> Iterator[int]:  # fmt: skip
    """RAM of the archive alone: all of it there, or as much on disk as may be."""
    yield pages * cost.page_bytes
    cold = min(pages, disk_bytes // cost.page_bytes)
    if cold > 0:
        yield (pages - cold) * cost.page_bytes + _recall_bytes(cost, costs, split)


def _rung(share: float, wishes: Wishes, step_tokens: int) -> Split:
    sinks = _between(SINKS, share) if wishes.sinks is None else wishes.sinks
    window = _between(WINDOW, share) if wishes.window is None else wishes.window
    if wishes.hot_tokens is not None:
        window = min(window, max(wishes.hot_tokens - sinks, 1))
    hot = max(sinks + window, wishes.hot_tokens or 0)
    recall = RECALL_TOKENS if wishes.recall_tokens is None else wishes.recall_tokens
    chunk = wishes.chunk or next((size for size in CHUNKS if size <= hot - sinks), CHUNKS[-1])
    return Split(chunk, sinks, window, hot, recall, step_tokens)


def _between(ends: tuple[int, int], share: float) -> int:
    return round(ends[0] + (ends[1] - ends[0]) * share)


def _pages(tokens: int, split: Split) -> int:
    return -(-max(tokens - split.hot_tokens, 0) // ARCHIVE_PAGE_TOKENS)


def _recall_bytes(cost: ArchiveCost, costs: Costs, split: Split) -> int:
    """What is recalled from disk at one moment: a part of one KV head's choice on each thread."""
    tokens = min(split.recall_tokens, RECALL_PART_TOKENS) * costs.threads
    return math.ceil(cost.bytes_per_token / costs.heads * tokens)


def _scored(costs: Costs, split: Split) -> Costs:
    """A scorer works only where more stays hot than sinks and window."""
    return costs if split.hot_tokens > split.sinks + split.window else replace(costs, scoring_bytes_per_token=0)


def _left(work: _Work, split: Split, cost: ArchiveCost, pages: int) -> int:
    """Bytes that are left of the KV cache's room beside the hot pages and the digests."""
    held, costs = split.capacity_tokens, _scored(work.costs, split)
    hot = costs.kv_bytes(held) + costs.window_bytes(split.chunk)
    scoring = costs.scoring_bytes_per_token * costs.page_tokens * costs.pages(held)
    room = work.room.beside(costs, split.chunk) - scoring - split.fork_bytes(costs)
    if work.room.budget_bytes is not None:  # which pays neither for scoring nor for forks
        room = min(room, work.room.budget_bytes)
    return room - hot - pages * cost.digest_page_bytes


def _warm(work: _Work, split: Split, cost: ArchiveCost) -> Plan | None:
    pages = _pages(work.tokens, split)
    spare = _left(work, split, cost, pages) - pages * cost.page_bytes
    if spare < 0:
        return None
    growth = _pages(work.longest_tokens, split) - pages
    pages += max(min(growth, spare // (cost.page_bytes + cost.digest_page_bytes)), 0)
    return _plan(work, split, cost, "warm", pages, warm_pages=pages)


def _on_disk(work: _Work, split: Split, cost: ArchiveCost) -> Plan | None:
    """As much in RAM as there is room for, the rest on disk."""

    def spare(pages: int) -> int:
        return _left(work, split, cost, pages) - _recall_bytes(cost, work.costs, split)

    pages = _pages(work.tokens, split)
    warm = min(spare(pages) // cost.page_bytes, pages)
    if warm < 0 or (pages - warm) * cost.page_bytes > work.disk_bytes:
        return None
    most = min(_pages(work.longest_tokens, split), work.disk_bytes // cost.page_bytes)
    growth = range(pages + 1, most + 1)  # digests and recalled tokens grow with it
    pages += bisect_right(growth, 0, key=lambda grown: -spare(grown))
    warm = min(spare(pages) // cost.page_bytes, pages)
    return _plan(work, split, cost, "mixed" if warm else "cold", pages, warm_pages=warm)


def _plan(
    work: _Work, split: Split, cost: ArchiveCost, placement: Placement, pages: int, *, warm_pages: int
) -> Plan:  # fmt: skip
    costs, held = _scored(work.costs, split), split.capacity_tokens
    windows = costs.window_bytes(split.chunk)  # whatever the text's length: with an archive it may always go on
    warm, cold = warm_pages * cost.page_bytes, (pages - warm_pages) * cost.page_bytes
    digests = pages * cost.digest_page_bytes
    recall = _recall_bytes(cost, costs, split) if cold else 0
    rows = [
        *costs.rows(split.chunk, held, windows),
        (f"archive in RAM ({cost.codec})", warm),
        ("digests of the archive", digests),
        ("recalled tokens", recall),
        ("hot pages of a fork", split.fork_bytes(costs)),
    ]
    return Plan(
        limit_bytes=work.room.limit_bytes, chunk=split.chunk, hot_tokens=split.hot_tokens,
        capacity_tokens=split.capacity_tokens, kv_limit_bytes=costs.kv_bytes(held) + windows, rows=tuple(rows),
        placement=placement, codec=cost.codec, retriever=cost.retriever, sinks=split.sinks, window=split.window,
        recall_tokens=split.recall_tokens,
        archive_tokens=pages * ARCHIVE_PAGE_TOKENS, warm_bytes=warm,
        cold_bytes=cold, digest_bytes=digests, recall_bytes=recall, fork_bytes=split.fork_bytes(costs),
        windows=costs.windows, window_bytes=windows,
    )  # fmt: skip
