"""The records of the planner: what work costs, what a person asked for, and the plan that comes out."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal

CHUNKS = (512, 256, 128, 64)  # tokens read at a time, the fastest first
# Beyond what is counted: growth of the allocator and the interpreter, measured over the runs in docs/lab-notes.md.
MARGIN_BYTES = 24 << 20
MARGIN_SHARE = 0.01
ARCHIVE_STEP = 64  # tokens that leave the window together: up to one fewer wait in the hot tier
ARCHIVE_PAGE_TOKENS = 256  # consecutive tokens of one KV head that are stored together
BLOCK_TOKENS = 16  # what has one digest and is recalled whole
PAGE_TOKENS = 64  # of the hot tier

PIECE_TOKENS = 2048  # of a text that is compiled: so many are repeated at a time

WHOLE_TOKENS = 8192
"""Up to so many tokens the whole cache is kept when it fits. Beyond, an archive reads and answers faster every time:
at 16K tokens twice as fast, and what is lost was measured (docs/lab-notes.md)."""

# A layer with a window also holds so much before it: what waits for a whole page, and what a turn is cut back by.
WINDOW_WAITING = 128
MARK_TOKENS = 1024  # of a window, what a question pushes out and brings back when it is cancelled; longer ones may fail

Placement = Literal["full", "warm", "mixed", "cold", "pruned", "compiled"]


@dataclass(frozen=True)
class ArchiveCost:
    """A codec and a retriever: what a token takes in their forms, in bytes of all layers and KV heads together.

    Digests are in RAM wherever the token's payload lies. ``step_tokens`` leave the window together.
    """

    codec: str
    bytes_per_token: float
    retriever: str = ""
    digest_bytes_per_token: float = 0.0
    step_tokens: int = ARCHIVE_STEP

    @property
    def page_bytes(self) -> int:
        """`ARCHIVE_PAGE_TOKENS` tokens of every layer and KV head."""
        return math.ceil(self.bytes_per_token * ARCHIVE_PAGE_TOKENS)

    @property
    def digest_page_bytes(self) -> int:
        """Digests of as many."""
        return math.ceil(self.digest_bytes_per_token * ARCHIVE_PAGE_TOKENS)


@dataclass(frozen=True)
class WindowCost:
    """Layers or KV heads that see the last ``window`` tokens only, and hold no more however long the text is. Of heads
    that also see the first ones these are counted in."""

    window: int
    page_bytes: int  # one page of every such KV head
    marked_tokens: int = MARK_TOKENS  # at most so many are kept while something is read that may be undone

    @property
    def held_tokens(self) -> int:
        """At most, between two chunks."""
        return self.window + WINDOW_WAITING

    def tokens(self, held: int, chunk: int) -> int:
        """At most, beside ``held`` tokens of a layer that forgets nothing: with the chunk that is being read, and what
        is kept while a question is read."""
        marked = min(self.held_tokens, self.marked_tokens) + PAGE_TOKENS
        return min(held, self.held_tokens + chunk) + min(held, marked)

    def pruned_tokens(self, held: int, chunk: int) -> int:
        """As `tokens`, with a budget: ``held`` are the budget and two chunks. Where that is shorter than the window,
        the layer is pruned as well, and a question that is read has copies of all its pages."""
        return min(2 * held + 2 * WINDOW_WAITING + PAGE_TOKENS, self.tokens(sys.maxsize, chunk))


@dataclass(frozen=True)
class Costs:
    """What work costs in bytes. KV bytes are of all layers and heads together that see everything.

    ``archive``: what to choose among, the best quality first. ``windows``: the other layers.
    """

    process_bytes: int  # resident now: interpreter, libraries, tokenizer, document
    weight_bytes: int  # mapped weights, resident once every layer has run
    scratch_bytes_per_chunk_token: int
    page_tokens: int
    kv_bytes_per_page: int  # one page of every layer that sees everything, and KV head
    observed_bytes: int  # queries kept for the scorer
    scoring_bytes_per_token: int = 0  # a scorer's working memory for each token that is held, one layer at a time
    archive: tuple[ArchiveCost, ...] = ()
    heads: int = 1  # KV heads of all layers together that see everything
    threads: int = 1
    windows: tuple[WindowCost, ...] = ()

    def pages(self, tokens: int) -> int:
        """Pages of one KV head that hold ``tokens``."""
        return -(-tokens // self.page_tokens)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the pages that ``tokens`` per KV head need, of layers that see everything."""
        return self.pages(tokens) * self.kv_bytes_per_page

    def window_bytes(self, chunk: int, held: int = sys.maxsize, *, pruned: bool = False) -> int:
        """Bytes of layers and heads with a window, when one without holds ``held`` tokens. See `WindowCost`."""
        held = self.pages(held) * self.page_tokens
        tokens = [(each.pruned_tokens if pruned else each.tokens)(held, chunk) for each in self.windows]
        return sum(self.pages(count) * each.page_bytes for count, each in zip(tokens, self.windows, strict=True))

    @property
    def window_fork_bytes(self) -> int:
        """Pages of these layers that a fork comes to have of its own, while what it was forked from holds its own."""
        return sum((self.pages(each.held_tokens) + 1) * each.page_bytes for each in self.windows)

    def rows(self, chunk: int, held_tokens: int, window_bytes: int = 0) -> list[tuple[str, int]]:
        """What takes memory when ``held_tokens`` per KV head are hot and ``chunk`` are read at a time."""
        scored = self.page_tokens * self.pages(held_tokens)
        return [
            ("program, tokenizer, document", self.process_bytes),
            ("weights", self.weight_bytes),
            (f"graph scratch for {chunk} tokens at a time", self.scratch_bytes_per_chunk_token * chunk),
            ("observed queries", self.observed_bytes),
            ("scoring, one layer at a time", self.scoring_bytes_per_token * scored),
            ("KV cache", self.kv_bytes(held_tokens)),
            ("KV cache of layers or heads with a window", window_bytes),
        ]


@dataclass(frozen=True)
class Wishes:
    """What a person set (``--kv``); None: the planner chooses. ``budget_bytes`` bounds all of the KV cache in RAM."""

    hot_tokens: int | None = None
    chunk: int | None = None
    sinks: int | None = None
    window: int | None = None
    recall_tokens: int | None = None
    budget_bytes: int | None = None


@dataclass(frozen=True)
class Prediction:
    """How long it will take: reading the text, and then each second of answering. See `devices.roofline`."""

    read_seconds: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """How a text of some length is read. ``hot_tokens`` None keeps the whole cache; ``chunk`` tokens go at a time.

    With an archive (``codec`` is not None) ``hot_tokens`` is sinks + window + what a scorer keeps beyond these; the
    rest lies encoded in RAM (``warm_bytes`` at most) and on disk (``cold_bytes``), and ``recall_tokens`` of it are
    attended to at a time. ``archive_tokens`` is what there is room for, digests included.
    """

    limit_bytes: int
    chunk: int
    hot_tokens: int | None
    capacity_tokens: int  # per KV head: what may be hot at once
    kv_limit_bytes: int  # of the hot pages of all layers
    rows: tuple[tuple[str, int], ...]
    placement: Placement = "full"
    codec: str | None = None
    retriever: str | None = None
    sinks: int | None = None  # None: as the settings say
    window: int | None = None
    recall_tokens: int = 0
    archive_tokens: int = 0
    warm_bytes: int = 0
    cold_bytes: int = 0
    digest_bytes: int = 0
    recall_bytes: int = 0  # recalled tokens in the codec's form, a part at a time; warm ones are read in place
    fork_bytes: int = 0  # hot pages that a fork comes to have beside those of what it was forked from
    full_limit_bytes: int = 0  # the smallest limit of the process that would keep the whole cache
    windows: tuple[WindowCost, ...] = ()
    window_bytes: int = 0  # of layers and heads with a window, within ``kv_limit_bytes``
    is_long: bool = False  # longer than `WHOLE_TOKENS`: an archive is faster than the whole cache, even where that fits
    predicted: Prediction | None = None

    @property
    def total_bytes(self) -> int:
        """What the process will take at most."""
        return sum(size for _, size in self.rows)

    @property
    def kv_ram_bytes(self) -> int:
        """All of the KV cache that is in RAM: hot pages, warm pages, digests, recalled tokens."""
        return self.kv_limit_bytes + self.warm_bytes + self.digest_bytes + self.recall_bytes

    def held_bytes(self, tokens: int) -> int:
        """The KV cache in RAM once ``tokens`` are read: without the chunks that the plan leaves room for."""
        hot = tokens if self.hot_tokens is None else min(tokens, self.hot_tokens)
        if self.codec is not None:
            hot += ARCHIVE_STEP // 2
        limit = self.kv_limit_bytes - self.window_bytes
        hot_bytes = min(limit * hot // (self.capacity_tokens + (self.chunk if self.codec is None else 0)), limit)
        most = hot if self.codec is None else tokens
        for each in self.windows:
            hot_bytes += -(-min(most, each.held_tokens) // PAGE_TOKENS) * each.page_bytes
        return hot_bytes + self.warm_bytes + self.digest_bytes + self.recall_bytes


@dataclass(frozen=True)
class Room:
    """What a plan may take: the limit of the process, and within it of the KV cache (None: no other limit)."""

    limit_bytes: int
    budget_bytes: int | None = None

    def beside(self, costs: Costs, chunk: int) -> int:
        """Bytes of the process beside what is there without any KV; below 0 when that alone is too much."""
        fixed = sum(size for _, size in costs.rows(chunk, 0))
        return int(self.limit_bytes * (1 - MARGIN_SHARE)) - MARGIN_BYTES - fixed


@dataclass(frozen=True)
class Need:
    """The smallest form of some way to read: bytes of the process, and of its KV cache in RAM."""

    total_bytes: int
    kv_bytes: int

    @property
    def limit_bytes(self) -> int:
        """The smallest limit of the process that allows it, to a few bytes."""
        return int((self.total_bytes + MARGIN_BYTES) / (1 - MARGIN_SHARE)) + 1
