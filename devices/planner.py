"""From one number, the memory limit of the process, to how a document is read: every byte counted beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import MemoryLimitError
from .sizes import format_size

CHUNKS = (512, 256, 128, 64)  # tokens read at a time, the fastest first
# Beyond what is counted: growth of the allocator and the interpreter, measured over the runs in docs/lab-notes.md.
MARGIN_BYTES = 24 << 20
MARGIN_SHARE = 0.01


@dataclass(frozen=True)
class Costs:
    """What work costs in bytes. KV bytes are of all layers and heads together."""

    process_bytes: int  # resident now: interpreter, libraries, tokenizer, document
    weight_bytes: int  # mapped weights, resident once every layer has run
    scratch_bytes_per_chunk_token: int
    page_tokens: int
    kv_bytes_per_page: int  # one page of every layer and KV head
    observed_bytes: int  # queries kept for the scorer
    scoring_bytes_per_token: int = 0  # a scorer's working memory for each token that is held, one layer at a time

    def pages(self, tokens: int) -> int:
        """Pages of one KV head that hold ``tokens``."""
        return -(-tokens // self.page_tokens)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the pages that ``tokens`` per KV head need."""
        return self.pages(tokens) * self.kv_bytes_per_page


@dataclass(frozen=True)
class Plan:
    """How a text of some length is read. ``hot_tokens`` None keeps the whole cache; ``chunk`` tokens go at a time."""

    limit_bytes: int
    chunk: int
    hot_tokens: int | None
    capacity_tokens: int  # per KV head: what may be held at once
    kv_limit_bytes: int  # of the pages, those of forks included
    rows: tuple[tuple[str, int], ...]

    @property
    def total_bytes(self) -> int:
        """What the process will take at most."""
        return sum(size for _, size in self.rows)


def make_plan(
    costs: Costs,
    limit_bytes: int,
    *,
    tokens: int,
    least_hot_tokens: int,
    hot_tokens: int | None = None,
    chunk: int | None = None,
    keep_everything: bool = False,
    longest_tokens: int = 0,
) -> Plan:
    """The fastest way to read ``tokens`` inside ``limit_bytes``.

    The whole cache stays when it fits and no ``hot_tokens`` are asked for, with room to grow to ``longest_tokens`` as
    far as there is any; else the largest budget that fits. ``keep_everything`` (policy ``full``) refuses a budget.

    Raises:
        MemoryLimitError: not even the smallest way fits; the message has the smallest limit that would.
    """
    chunks = (chunk,) if chunk else CHUNKS
    if keep_everything:
        costs = replace(costs, scoring_bytes_per_token=0)
    if hot_tokens is None:
        for size in chunks:
            most = _capacity(costs, limit_bytes, size)
            if tokens <= most:
                return _plan(costs, limit_bytes, size, None, min(most, max(tokens, longest_tokens)))
    if not keep_everything:
        # A small budget wants small chunks: one should not be more than half of what stays.
        plans = [_pruned(costs, limit_bytes, size, least_hot_tokens, hot_tokens) for size in chunks]
        found = [plan for plan in plans if plan]
        roomy = [plan for plan in found if (plan.hot_tokens or 0) >= 2 * plan.chunk]
        if found:
            return (roomy or found)[0 if roomy or hot_tokens is not None else -1]
    pruned = (hot_tokens or least_hot_tokens) + chunks[-1]
    held = tokens if keep_everything else pruned if hot_tokens else min(tokens, pruned)
    needed = sum(size for _, size in _rows(costs, chunks[-1], held + chunks[-1]))
    needed = int((needed + MARGIN_BYTES) / (1 - MARGIN_SHARE)) + 1
    if keep_everything:
        remedy = "raise --memory or leave out --policy full"
    elif hot_tokens is not None:
        remedy = "raise --memory or lower --kv hot_tokens"
    else:
        remedy = "raise --memory or take a smaller model"
    raise MemoryLimitError(
        f"{format_size(limit_bytes)} of memory is too little for {tokens:,} tokens with this model: "
        f"{format_size(needed, round_up=True)} would do; {remedy}",
        smallest_bytes=needed,
    )


def _capacity(costs: Costs, limit: int, chunk: int) -> int:
    """Tokens per KV head that fit; a fork's turn may take a chunk more, which is left out."""
    fixed = sum(size for _, size in _rows(costs, chunk, 0))
    room = int(limit * (1 - MARGIN_SHARE)) - MARGIN_BYTES - fixed
    page_bytes = costs.kv_bytes_per_page + costs.scoring_bytes_per_token * costs.page_tokens
    return max(room, 0) // page_bytes * costs.page_tokens - chunk


def _pruned(costs: Costs, limit: int, chunk: int, least_hot: int, hot_tokens: int | None) -> Plan | None:
    most = _capacity(costs, limit, chunk)
    hot = most - chunk if hot_tokens is None else hot_tokens
    return _plan(costs, limit, chunk, hot, hot + chunk) if least_hot <= hot <= most - chunk else None


def _plan(costs: Costs, limit: int, chunk: int, hot_tokens: int | None, capacity: int) -> Plan:
    held = capacity + chunk
    return Plan(limit, chunk, hot_tokens, capacity, costs.kv_bytes(held), tuple(_rows(costs, chunk, held)))


def _rows(costs: Costs, chunk: int, held_tokens: int) -> list[tuple[str, int]]:
    return [
        ("program, tokenizer, document", costs.process_bytes),
        ("weights", costs.weight_bytes),
        (f"graph scratch for {chunk} tokens at a time", costs.scratch_bytes_per_chunk_token * chunk),
        ("observed queries", costs.observed_bytes),
        ("scoring, one layer at a time", costs.scoring_bytes_per_token * costs.page_tokens * costs.pages(held_tokens)),
        ("KV cache", costs.kv_bytes(held_tokens)),
    ]
