"""How long reading and answering take: a few rates of this machine, and the work that a plan makes of a text.

The rates are measured with the model itself (`runtime.predict`) or, failing that, worked out from its operations and
bytes with the constants below. A text of T tokens costs T times the linear layers plus, for each of its tokens, the
tokens that it attends to, which are a window's at most in layers that have one; with an archive also choosing (passes
over the digests), writing to disk and reading back.
A chunk chooses anew for each few of its queries; while answering, a choice serves some tokens, and what it has on disk
is read for each of them. The device answers only what the system's file cache has no room for: what was written a
moment ago is still there, and so is, from a choice's second token on, all that it wants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .flash import Flash
from .planner.plan import ARCHIVE_STEP, BLOCK_TOKENS, PIECE_TOKENS, Plan, Prediction

# Of one core with 256-bit vectors at about 3 GHz, and of two channels of memory: see docs/lab-notes.md and the
# benchmarks of the linear layers and of attention.
LINEAR_FLOPS_PER_THREAD = 45e9
ATTENTION_FLOPS_PER_THREAD = 20e9
MEMORY_BYTES_PER_SECOND = 10e9
# As kernels/native/attend.cc has it: a chunk longer than LONG_CHUNK makes one choice for QUERIES_PER_CHOICE queries
# with every VOTER_STRIDE-th of them, a shorter one for QUERIES_OF_SHORT_CHUNK with all; each goes over all digests.
LONG_CHUNK, QUERIES_PER_CHOICE, QUERIES_OF_SHORT_CHUNK, VOTER_STRIDE = 48, 64, 4, 4
WATCHED_SHARE = 0.5  # of a pair's attention: to see how much it was, the logit is worked out once more, but no value
READS_AT_ONCE = 8  # batched, and fetched for the next layer while this one computes
OVERLAP = 0.22  # 16 choices of a chunk wanted 1.8 times as many blocks as one of them: smollm2-135m over a manual
CACHED_READ_SECONDS = 2e-6  # of a block that was read a moment ago
DISK_UNIT_BYTES = 4096  # what direct reads are rounded to


@dataclass(frozen=True)
class Work:
    """What one token costs in a model, by arithmetic.

    ``kv_heads`` are those of all layers together that see everything; ``windows``: of each other one; ``heads``: of
    both kinds.
    """

    linear_flop_per_token: float
    weight_bytes: float
    pair_flop: float  # one query token, one attended token, all layers and heads
    pair_bytes: float
    kv_heads: int
    heads: int = 1
    windows: tuple[int, ...] = ()

    @property
    def full_share(self) -> float:
        """Of the KV heads, those that see everything."""
        return 1 - len(self.windows) / self.heads


@dataclass(frozen=True)
class Rates:
    """Seconds on this machine: of a token without attention, and of each token that it attends to."""

    prefill_seconds_per_token: float
    prefill_seconds_per_pair: float
    decode_seconds_per_token: float
    decode_seconds_per_pair: float
    is_measured: bool

    @property
    def is_sound(self) -> bool:
        """Whether these can be rates at all: a damaged file may hold anything."""
        tokens = (self.prefill_seconds_per_token, self.decode_seconds_per_token)
        pairs = (self.prefill_seconds_per_pair, self.decode_seconds_per_pair)
        return all(0 < each < math.inf for each in tokens) and all(0 <= each < math.inf for each in pairs)


def estimated_rates(work: Work, threads: int) -> Rates:
    """The rates by arithmetic alone: right within a factor of three or so."""
    return Rates(
        prefill_seconds_per_token=work.linear_flop_per_token / (threads * LINEAR_FLOPS_PER_THREAD),
        prefill_seconds_per_pair=work.pair_flop / (threads * ATTENTION_FLOPS_PER_THREAD),
        decode_seconds_per_token=max(
            work.weight_bytes / MEMORY_BYTES_PER_SECOND,
            work.linear_flop_per_token / (threads * LINEAR_FLOPS_PER_THREAD),
        ),
        decode_seconds_per_pair=work.pair_bytes / MEMORY_BYTES_PER_SECOND,
        is_measured=False,
    )


def predict(
    plan: Plan, tokens: int, rates: Rates, work: Work, flash: Flash, *, recall_every: int, file_cache_bytes: int = 0
) -> Prediction:  # fmt: skip
    """Reading ``tokens`` tokens by ``plan``, and the rate of answering after them.

    ``file_cache_bytes``: of the archive on disk, what the system has room for in its file cache.
    """
    reach = _reach(plan)
    read = tokens * rates.prefill_seconds_per_token
    read += _mean(work, lambda window: attended_pairs(plan, tokens, window)) * rates.prefill_seconds_per_pair
    if plan.placement == "compiled":
        read += tokens * rates.prefill_seconds_per_token
        read += _mean(work, lambda window: repeated_pairs(tokens, window)) * rates.prefill_seconds_per_pair
    decode = rates.decode_seconds_per_token
    decode += _mean(work, lambda window: min(tokens, window or reach)) * rates.decode_seconds_per_pair
    if plan.codec is not None:
        archived = max(tokens - (plan.hot_tokens or 0), 0)
        chunks = archived / plan.chunk  # those that find something in the archive
        # a query looks at a digest as at a token, in heads that see everything
        scanned = archived / BLOCK_TOKENS * work.full_share if plan.digest_bytes else 0
        half_full = 1 / 2  # the archive grows while the text is read
        read += chunks * half_full * scanned * voters(plan.chunk) * rates.prefill_seconds_per_pair
        wanted = min(wanted_tokens(plan), archived / 2)
        read += chunks * fetch_seconds(plan, work, flash, wanted, file_cache_bytes)
        read += plan.cold_bytes / flash.bandwidth
        wanted = min(plan.recall_tokens, archived)
        decode += scanned * rates.decode_seconds_per_pair / recall_every
        decode += fetch_seconds(plan, work, flash, wanted, file_cache_bytes) / recall_every
        decode += cold_blocks(plan, work, wanted) * CACHED_READ_SECONDS * (1 - 1 / recall_every)
    return Prediction(read, 1 / decode)


def choices(chunk: int) -> int:
    """How many times a chunk chooses what it recalls, for each KV head."""
    return -(-chunk // (QUERIES_PER_CHOICE if chunk > LONG_CHUNK else QUERIES_OF_SHORT_CHUNK))


def voters(chunk: int) -> int:
    """Query tokens of a chunk that are scored against all digests."""
    if chunk <= LONG_CHUNK:
        return chunk
    whole, rest = divmod(chunk, QUERIES_PER_CHOICE)
    return whole * QUERIES_PER_CHOICE // VOTER_STRIDE + -(-rest // VOTER_STRIDE)


def attended_pairs(plan: Plan, tokens: int, window: int = 0) -> float:
    """Pairs of a token and one that it attends to, over a text of ``tokens`` that is read by ``plan``, in a layer with
    this window (0: none)."""
    if window and not (plan.placement == "pruned" and window > (plan.hot_tokens or 0)):
        begun = min(tokens, window)  # tokens that see all before them
        return begun * (begun + 1) / 2 + (tokens - begun) * float(window)
    reach, pairs = math.inf if plan.placement == "compiled" else _reach(plan), 0.0
    for first in range(0, tokens, plan.chunk):
        count = min(plan.chunk, tokens - first)
        pairs += count * (min(first, reach) + (count + 1) / 2)
    return pairs


def repeated_pairs(tokens: int, window: int = 0) -> float:
    """Pairs that are attended to while a text of ``tokens`` is compiled, in a layer with this window (0: none)."""
    if window:
        return tokens * float(min(tokens, window))
    piece = min(tokens, PIECE_TOKENS)
    return tokens * (tokens + piece / 2 + piece * WATCHED_SHARE)


def _mean(work: Work, attended: Callable[[int], float]) -> float:
    """Of ``attended(window)`` over the KV heads; one that sees everything has the window 0."""
    total = (work.heads - len(work.windows)) * attended(0)
    return (total + sum(count * attended(window) for window, count in Counter(work.windows).items())) / work.heads


def wanted_tokens(plan: Plan) -> float:
    """Tokens per KV head that a chunk recalls: its choices overlap, the more so the more there are."""
    return float(plan.recall_tokens * choices(plan.chunk) ** OVERLAP)


def cold_blocks(plan: Plan, work: Work, tokens: float) -> float:
    """Blocks, of all KV heads, of ``tokens`` recalled ones that lie on disk."""
    if not plan.cold_bytes:
        return 0.0
    return tokens / BLOCK_TOKENS * work.kv_heads * plan.cold_bytes / (plan.warm_bytes + plan.cold_bytes)


def fetch_seconds(plan: Plan, work: Work, flash: Flash, tokens: float, file_cache_bytes: int = 0) -> float:
    """Reading ``tokens`` recalled tokens per KV head, as far as they lie on disk; see `predict`."""
    if not plan.cold_bytes:
        return 0.0
    blocks = cold_blocks(plan, work, tokens)
    per_token = (plan.warm_bytes + plan.cold_bytes) / plan.archive_tokens / work.kv_heads
    units = math.ceil(per_token * BLOCK_TOKENS / DISK_UNIT_BYTES) + 1  # it starts where it may
    read_bytes = units * DISK_UNIT_BYTES
    cached = min(file_cache_bytes / plan.cold_bytes, 1.0)
    missed = blocks * (1 - cached)
    return blocks * cached * CACHED_READ_SECONDS + flash.seconds(missed * read_bytes, missed / READS_AT_ONCE)


def _reach(plan: Plan) -> float:
    """Tokens before its chunk that a token attends to at most."""
    if plan.hot_tokens is None:
        return math.inf
    waiting = ARCHIVE_STEP / 2 if plan.codec is not None else 0
    return plan.hot_tokens + waiting + plan.recall_tokens
