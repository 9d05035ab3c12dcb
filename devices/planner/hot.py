"""Plans without an archive: the whole cache as floats, or a budget that forgets what a scorer ranks low."""

from __future__ import annotations

from bisect import bisect_right

from .plan import CHUNKS, Costs, Need, Placement, Plan, Room, Wishes

MOST_PAGES = 1 << 25  # of one KV head: more tokens than a position can number


def full_plan(costs: Costs, room: Room, tokens: int, longest_tokens: int, chunks: tuple[int, ...]) -> Plan | None:
    """Everything stays; the largest chunk that leaves room for it, and then as much room to grow as there is."""
    for chunk in chunks:
        most = _capacity(costs, room, chunk)
        if tokens <= most:
            if longest_tokens and not costs.kv_bytes_per_page:  # nothing grows beyond the windows
                longest_tokens = most
            return _plan(costs, room, chunk, None, min(most, max(tokens, longest_tokens)), "full")
    return None


def pruned_plan(
    costs: Costs, room: Room, least_hot_tokens: int, wishes: Wishes, chunks: tuple[int, ...]
) -> Plan | None:  # fmt: skip
    """The largest budget of hot tokens, or the one asked for."""
    # A small budget wants small chunks: one should not be more than half of what stays.
    plans = [_pruned(costs, room, size, least_hot_tokens, wishes.hot_tokens) for size in chunks]
    found = [plan for plan in plans if plan]
    roomy = [plan for plan in found if (plan.hot_tokens or 0) >= 2 * plan.chunk]
    if not found:
        return None
    return (roomy or found)[0 if roomy or wishes.hot_tokens is not None else -1]


def hot_need(costs: Costs, held_tokens: int, wishes: Wishes, *, pruned: bool = False) -> Need:
    """What it takes to have ``held_tokens`` (and the chunk being read) hot."""
    chunk = wishes.chunk or CHUNKS[-1]
    held = held_tokens + chunk
    windows = costs.window_bytes(chunk, held, pruned=pruned)
    total = sum(size for _, size in costs.rows(chunk, held, windows)) + costs.window_fork_bytes
    return Need(total, costs.kv_bytes(held) + windows)


def _capacity(costs: Costs, room: Room, chunk: int, *, pruned: bool = False) -> int:
    """Tokens per KV head that fit; a fork's turn may take a chunk more, which is left out."""
    beside = room.beside(costs, chunk) - costs.window_fork_bytes

    def is_too_much(pages: int) -> bool:
        held = pages * costs.page_tokens
        kv_bytes = costs.kv_bytes(held) + costs.window_bytes(chunk, held, pruned=pruned)
        if room.budget_bytes is not None and kv_bytes > room.budget_bytes:  # which does not pay for scoring
            return True
        return kv_bytes + costs.scoring_bytes_per_token * held > beside

    pages = bisect_right(range(1, MOST_PAGES), False, key=is_too_much)
    return pages * costs.page_tokens - chunk


def _pruned(costs: Costs, room: Room, chunk: int, least_hot: int, hot_tokens: int | None) -> Plan | None:
    most = _capacity(costs, room, chunk, pruned=True)
    hot = most - chunk if hot_tokens is None else hot_tokens
    fits = least_hot <= hot <= most - chunk
    return _plan(costs, room, chunk, hot, hot + chunk, "pruned") if fits else None


def _plan(
    costs: Costs, room: Room, chunk: int, hot_tokens: int | None, capacity: int, placement: Placement
) -> Plan:  # fmt: skip
    held = capacity + chunk
    windows = costs.window_bytes(chunk, held, pruned=placement == "pruned")
    rows = (*costs.rows(chunk, held, windows), ("hot pages of a fork", costs.window_fork_bytes))
    return Plan(
        room.limit_bytes, chunk, hot_tokens, capacity, costs.kv_bytes(held) + windows, rows, placement,
        fork_bytes=costs.window_fork_bytes, windows=costs.windows, window_bytes=windows,
    )  # fmt: skip
