"""How long reading and answering take: a few rates of this machine, and the work that a plan makes of a text.

The rates are measured with the model itself (`runtime.predict`) or, failing that, worked out from its operations and
bytes with the constants below. A text of T tokens costs T times the linear layers plus, for each of its tokens, the
tokens that it attends to; with an archive also choosing (a pass over the digests), writing to disk and reading back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .flash import Flash
from .planner.plan import ARCHIVE_STEP, BLOCK_TOKENS, Plan, Prediction

# Of one core with 256-bit vectors at about 3 GHz, and of two channels of memory: see docs/lab-notes.md and the
# benchmarks of the linear layers and of attention.
LINEAR_FLOPS_PER_THREAD = 45e9
ATTENTION_FLOPS_PER_THREAD = 20e9
MEMORY_BYTES_PER_SECOND = 10e9
DIGEST_BYTES_PER_SECOND_AND_THREAD = 4e9  # int8 products with one query
QUERIES_PER_CHOICE = 16  # a chunk chooses with that many of its queries
READS_AT_ONCE = 8  # batched, and fetched for the next layer while this one computes
DISK_UNIT_BYTES = 4096  # what direct reads are rounded to


@dataclass(frozen=True)
class Work:
    """What one token costs in a model, by arithmetic. ``kv_heads`` are those of all layers together."""

    linear_flop_per_token: float
    weight_bytes: float
    pair_flop: float  # one query token, one attended token, all layers and heads
    pair_bytes: float
    kv_heads: int


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
    plan: Plan, tokens: int, rates: Rates, work: Work, flash: Flash, *, threads: int, recall_every: int
) -> Prediction:  # fmt: skip
    """Reading ``tokens`` tokens by ``plan``, and the rate of answering after them."""
    reach = _reach(plan)
    read = tokens * rates.prefill_seconds_per_token + attended_pairs(plan, tokens) * rates.prefill_seconds_per_pair
    decode = rates.decode_seconds_per_token + min(tokens, reach) * rates.decode_seconds_per_pair
    if plan.codec is not None:
        chunks = max(tokens - (plan.hot_tokens or 0), 0) / plan.chunk  # those that find something in the archive
        scan = plan.digest_bytes / (threads * DIGEST_BYTES_PER_SECOND_AND_THREAD)
        half_full = 1 / 2  # the archive grows while the text is read
        read += chunks * half_full * scan * QUERIES_PER_CHOICE
        read += chunks * half_full * fetch_seconds(plan, work, flash) + plan.cold_bytes / flash.bandwidth
        decode += (scan + fetch_seconds(plan, work, flash)) / recall_every
    return Prediction(read, 1 / decode)


def attended_pairs(plan: Plan, tokens: int) -> float:
    """Pairs of a token and one that it attends to, over a text of ``tokens`` that is read by ``plan``."""
    reach, pairs = _reach(plan), 0.0
    for first in range(0, tokens, plan.chunk):
        count = min(plan.chunk, tokens - first)
        pairs += count * (min(first, reach) + (count + 1) / 2)
    return pairs


def fetch_seconds(plan: Plan, work: Work, flash: Flash) -> float:
    """Reading one choice of recalled blocks, as far as they lie on disk."""
    archived = plan.warm_bytes + plan.cold_bytes
    if not plan.cold_bytes or not plan.recall_tokens:
        return 0.0
    blocks = plan.recall_tokens / BLOCK_TOKENS * work.kv_heads * plan.cold_bytes / archived
    block_bytes = plan.recall_bytes / (plan.recall_tokens / BLOCK_TOKENS * work.kv_heads)
    read_bytes = (math.ceil(block_bytes / DISK_UNIT_BYTES) + 1) * DISK_UNIT_BYTES  # it starts where it may
    return flash.seconds(blocks * read_bytes, blocks / READS_AT_ONCE)


def _reach(plan: Plan) -> float:
    """Tokens before its chunk that a token attends to at most."""
    if plan.hot_tokens is None:
        return math.inf
    waiting = ARCHIVE_STEP / 2 if plan.codec is not None else 0
    return plan.hot_tokens + waiting + plan.recall_tokens
