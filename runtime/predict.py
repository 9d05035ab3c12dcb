"""How a text would be read, and how long it would take on this machine, before anything is read.

The rates are measured with the model itself in a few seconds, with made-up tokens, and remembered in the cache folder
for this model, thread count and processor. Attention is timed apart, over two lengths of a few layers: within a
whole step its share is too small to be seen.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median

import numpy as np

from .. import kernels
from ..cache import KVCache
from ..devices.flash import flash_of
from ..devices.machine import cpu_name
from ..devices.planner import Plan, why
from ..devices.remembered import remember, remembered
from ..devices.roofline import Rates, Work, estimated_rates, predict
from ..errors import ContextLengthError
from ..export.hub.cache_folder import cache_folder
from .memory import archive_costs, page_bytes
from .model import Model

CHUNK_TOKENS = 128
SLOW_CHUNK_SECONDS = 1.5  # a chunk that takes longer is timed once
DECODE_STEPS = 5
WARM_UP_TOKENS = 16
ATTENTION_LAYERS = 4  # enough that their pages do not all stay in the second-level cache
ATTENTION_LENGTHS = (256, 1280)
TAKES = 3
VALID_SECONDS = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Forecast:
    """A plan with its seconds, and the reasons in one sentence."""

    plan: Plan
    why: str
    disk_bytes: int
    rates: Rates


def forecast(model: Model, tokens: int, *, measure: bool = True) -> Forecast:
    """How ``model`` would read ``tokens`` tokens. ``measure`` False: rates by arithmetic, unless some are remembered.

    Raises:
        ContextLengthError: the model does not read that many tokens.
        MemoryLimitError: it does not fit into the memory limit; the message has the limit that would do.
    """
    if tokens > model.context_length:
        raise ContextLengthError(
            f"the model {model.name} reads at most {model.context_length:,} tokens, not {tokens:,}; plan for fewer, or "
            "for a model with a longer context (see 'satchel models')"
        )
    plan = model.plan(tokens)
    settings, threads = model.options.settings, model.options.threads
    rates, work = find_rates(model, measure=measure), work_of(model)
    folder = cache_folder(model.cache_dir)
    flash = flash_of(folder, folder)
    predicted = predict(plan, tokens, rates, work, flash, threads=threads, recall_every=settings.recall_every)
    best = archive_costs(model.package, settings)[0].codec
    return Forecast(replace(plan, predicted=predicted), why(plan, best), model.disk_bytes, rates)


def work_of(model: Model) -> Work:
    """The model's work for one token, from its sizes."""
    spec = model.package.spec
    attention = spec.hidden * spec.head_size * (2 * spec.heads + 2 * spec.kv_heads)
    per_layer = attention + 3 * spec.hidden * spec.feed_forward
    kv_heads = spec.layers * spec.kv_heads
    return Work(
        linear_flop_per_token=2 * spec.layers * per_layer,
        weight_bytes=model.package.weight_bytes,
        pair_flop=4 * spec.layers * spec.heads * spec.head_size,
        pair_bytes=kv_heads * page_bytes(spec.head_size, model.options.settings.storage) / kernels.PAGE_TOKENS,
        kv_heads=kv_heads,
    )


def find_rates(model: Model, *, measure: bool = True) -> Rates:
    """This machine's rates with ``model``: remembered, measured now, or (``measure`` False) worked out."""
    file = cache_folder(model.cache_dir) / "devices" / f"rates-{_key(model)}.json"
    value = remembered(file, valid_seconds=VALID_SECONDS)
    try:
        found = Rates(**(value or {}))
        if found.is_sound and found.is_measured:
            return found
    except TypeError:  # nothing remembered, or something else
        pass
    if not measure:
        return estimated_rates(work_of(model), model.options.threads)
    found = measure_rates(model)
    remember(file, asdict(found))
    return found


def measure_rates(model: Model) -> Rates:
    """Times a chunk, a few steps, and attention over two lengths: 2 to 5 seconds. Nothing is left of it."""
    vocab = model.package.spec.vocab
    ids = [(7919 * place + 13) % vocab for place in range(CHUNK_TOKENS)]
    begun = time.perf_counter()
    model.last_logits(ids[:WARM_UP_TOKENS])  # maps the weights, and notes what the process held before
    # the first run is the slowest: a chunk that it says is slow may be, but is timed once whatever it takes
    is_slow = (time.perf_counter() - begun) * CHUNK_TOKENS / WARM_UP_TOKENS > SLOW_CHUNK_SECONDS * TAKES
    chunks, steps = [], []
    for _ in range(1 if is_slow else TAKES):
        cache = KVCache(model.engine.cache_shape, model.options.settings, hot_tokens=None, threads=model.options.threads)
        try:
            chunks.append(_seconds(lambda held=cache: model.engine.run(ids, held)))
            if not steps:
                steps = [_seconds(lambda held=cache: model.engine.run(ids[:1], held)) for _ in range(DECODE_STEPS)]
        finally:
            cache.close()
        if sum(chunks) > SLOW_CHUNK_SECONDS:
            break
    per_pair = _attention_seconds(model, CHUNK_TOKENS) / CHUNK_TOKENS
    per_step = _attention_seconds(model, 1)
    inside = per_pair * (CHUNK_TOKENS + 1) / 2  # of each token's own chunk
    whole = median(chunks) / CHUNK_TOKENS
    step = median(steps)
    return Rates(
        prefill_seconds_per_token=max(whole - inside, whole / 2),
        prefill_seconds_per_pair=per_pair,
        decode_seconds_per_token=max(step - CHUNK_TOKENS * per_step, step / 2),
        decode_seconds_per_pair=per_step,
        is_measured=True,
    )


def _attention_seconds(model: Model, queries: int) -> float:
    """Seconds that ``queries`` tokens at once take for each further token that they attend to, in all layers."""
    shape, settings, threads = model.engine.cache_shape, model.options.settings, model.options.threads
    layers, rng = min(ATTENTION_LAYERS, shape.layers), np.random.default_rng(0)
    pages = kernels.KVCache(
        layers=layers, heads=shape.heads, kv_heads=shape.kv_heads, head_size=shape.head_size,
        storage=settings.storage, threads=threads,
    )  # fmt: skip

    def attend(first: int, count: int) -> None:
        q, k, v = (
            rng.standard_normal((count, heads, shape.head_size), dtype=np.float32)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        positions = np.arange(first, first + count)
        begun = time.perf_counter()
        for layer in range(layers):
            pages.attend(layer, q, k, v, positions, shape.frequencies, scale=shape.scale, threads=threads)
        takes.append(time.perf_counter() - begun)

    found = []
    try:
        for before, length in zip((0, *ATTENTION_LENGTHS), ATTENTION_LENGTHS, strict=False):
            takes: list[float] = []
            for first in range(before, length, ATTENTION_LENGTHS[0]):
                attend(first, min(ATTENTION_LENGTHS[0], length - first))
                pages.commit()
            takes.clear()
            for _ in range(TAKES):
                attend(length, queries)
                pages.rollback()
            found.append(median(takes))
    finally:
        pages.close()
    per_token = (found[1] - found[0]) / (ATTENTION_LENGTHS[1] - ATTENTION_LENGTHS[0])
    return max(per_token, 0.0) * shape.layers / layers


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _key(model: Model) -> str:
    """Names this model, this machine and how it is used."""
    options = model.options
    parts = (model.package.fingerprint, options.threads, cpu_name(), kernels.active_variant(), options.settings.storage)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

