"""How a text would be read, and how long it would take on this machine, before anything is read.

The rates are measured with the model itself in a few seconds, with made-up tokens, and remembered in the cache folder
for this model, thread count and processor. Attention is timed apart, over two lengths of a few layers: within a
whole step its share is too small to be seen.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from .. import kernels
from ..devices.files.cache_folder import cache_folder
from ..devices.flash import flash_of
from ..devices.machine import cpu_name, memory_available, resident_memory
from ..devices.planner import Plan, why
from ..devices.remembered import remember, remembered
from ..devices.roofline import Rates, Work, estimated_rates, predict
from ..export.rope import rope_frequencies
from .memory import archive_costs, full_heads, page_bytes
from .model import Model

CHUNK_TOKENS = 128
ENOUGH_SECONDS = 1.5  # spent on chunks: no further take then
DECODE_STEPS = 5
WARM_UP_TOKENS = 16
ATTENTION_LAYERS = 4  # enough that their pages do not all stay in the second-level cache
ATTENTION_LENGTHS = (256, 2048)
TAKES = 3
STEP_TAKES = 30  # of one query: less than a millisecond each, and easily disturbed
VALID_SECONDS = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Forecast:
    """A plan with its seconds, and the reasons in one sentence."""

    plan: Plan
    why: str
    disk_bytes: int
    rates: Rates


def forecast(model: Model, tokens: int, *, measure: bool | None = None) -> Forecast:
    """How ``model`` would read ``tokens`` tokens, be they more than its context has; ``measure`` as in `find_rates`.

    Raises:
        MemoryLimitError: it does not fit into the memory limit; the message has the limit that would do.
    """
    plan = model.plan(tokens)
    settings = model.options.settings
    rates, work = find_rates(model, measure=measure), work_of(model)
    folder = cache_folder(model.cache_dir)
    flash = flash_of(folder, folder)
    left = memory_available() + resident_memory().anon_bytes - plan.total_bytes  # to the system's file cache
    predicted = predict(
        plan, tokens, rates, work, flash, recall_every=settings.recall_every, file_cache_bytes=max(left, 0)
    )
    best = archive_costs(model.package, settings)[0].codec
    reason = why(plan, best)
    if tokens > model.context_length:
        reason += f" The text is longer than the {model.context_length:,} tokens that the model was trained for."
    return Forecast(replace(plan, predicted=predicted), reason, model.disk_bytes, rates)


def work_of(model: Model) -> Work:
    """The model's work for one token, from its sizes."""
    spec = model.package.spec
    attention = spec.hidden * spec.head_size * (2 * spec.heads + 2 * spec.kv_heads)
    per_layer = attention + 3 * spec.hidden * spec.feed_forward
    page = page_bytes(spec.head_size, model.options.settings.storage)
    streaming = model.engine.streaming
    return Work(
        linear_flop_per_token=2 * spec.layers * per_layer,
        weight_bytes=model.package.weight_bytes,
        pair_flop=4 * spec.layers * spec.heads * spec.head_size,
        pair_bytes=spec.layers * spec.kv_heads * page / kernels.PAGE_TOKENS,
        kv_heads=full_heads(spec, model.engine.windows, streaming),
        heads=spec.layers * spec.kv_heads,
        windows=tuple(window for window in spec.attention_windows if window for _ in range(spec.kv_heads))
        + ((streaming.sinks + streaming.window,) * streaming.count if streaming else ()),
    )


def find_rates(model: Model, *, measure: bool | None = None) -> Rates:
    """This machine's rates with ``model``: remembered, else measured now.

    ``measure`` True: measured in any case; False: never, and worked out where none are remembered.
    """
    file = cache_folder(model.cache_dir) / "devices" / f"rates-{_key(model)}.json"
    value = remembered(file, valid_seconds=VALID_SECONDS)
    try:
        found = Rates(**(value or {}))
        if found.is_sound and found.is_measured and not measure:
            return found
    except TypeError:  # nothing remembered, or something else
        pass
    if measure is False:
        return estimated_rates(work_of(model), model.options.threads)
    found = measure_rates(model)
    remember(file, asdict(found))
    return found


def measure_rates(model: Model) -> Rates:
    """Times a chunk, a few steps, and attention over two lengths: 2 to 5 seconds. Nothing is left of it."""
    vocab = model.package.spec.vocab
    ids = [(7919 * place + 13) % vocab for place in range(CHUNK_TOKENS)]
    model.last_logits(ids[:WARM_UP_TOKENS])  # maps the weights, and notes what the process held before
    chunk, *steps = _time_runs(model, [ids, *[ids[:1]] * DECODE_STEPS])
    chunks = [chunk]
    while len(chunks) < TAKES and sum(chunks) < ENOUGH_SECONDS:
        chunks += _time_runs(model, [ids])
    # the least of the takes: the one that other programs have disturbed least
    whole, step = min(chunks) / CHUNK_TOKENS, min(steps)
    per_pair = _attention_seconds(model, CHUNK_TOKENS) / CHUNK_TOKENS
    per_step = _attention_seconds(model, 1)
    inside = per_pair * (CHUNK_TOKENS + 1) / 2  # of each token's own chunk
    return Rates(
        prefill_seconds_per_token=max(whole - inside, whole / 2),
        prefill_seconds_per_pair=per_pair,
        decode_seconds_per_token=max(step - CHUNK_TOKENS * per_step, step / 2),
        decode_seconds_per_pair=per_step,
        is_measured=True,
    )


def _time_runs(model: Model, runs: Sequence[list[int]]) -> list[float]:
    """Seconds of each of ``runs``, one after the other in an empty cache."""
    cache = model.engine.new_cache(model.options.settings, hot_tokens=None)
    try:
        takes = []
        for ids in runs:
            begun = time.perf_counter()
            model.engine.run(ids, cache)
            takes.append(time.perf_counter() - begun)
        return takes
    finally:
        cache.close()


def _attention_seconds(model: Model, queries: int) -> float:
    """Seconds that ``queries`` tokens at once take for each further token that they attend to, in all layers."""
    shape = model.package.spec
    layers = min(ATTENTION_LAYERS, shape.layers)
    pages = kernels.KVCache(
        layers=layers, heads=shape.heads, kv_heads=shape.kv_heads, head_size=shape.head_size,
        storage=model.options.settings.storage, threads=model.options.threads,
    )  # fmt: skip
    step, found = ATTENTION_LENGTHS[0], []
    try:
        for first in range(0, ATTENTION_LENGTHS[-1], step):
            _attend(model, pages, layers, first, step)
            pages.commit()
            if first + step in ATTENTION_LENGTHS:
                takes = []
                for _ in range(TAKES if queries > 1 else STEP_TAKES):
                    takes.append(_attend(model, pages, layers, first + step, queries))
                    pages.rollback()
                found.append(min(takes))
    finally:
        pages.close()
    per_token = (found[1] - found[0]) / (ATTENTION_LENGTHS[1] - ATTENTION_LENGTHS[0])
    return max(per_token, 0.0) * shape.layers / layers


def _attend(model: Model, pages: kernels.KVCache, layers: int, first: int, count: int) -> float:
    """Seconds of the attention of ``count`` made-up tokens at position ``first`` in some layers."""
    shape, rng = model.package.spec, np.random.default_rng(first)
    q, k, v = (
        rng.standard_normal((count, heads, shape.head_size), dtype=np.float32)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    positions = np.arange(first, first + count)
    frequencies = rope_frequencies(shape.rope)
    begun = time.perf_counter()
    for layer in range(layers):
        pages.attend(layer, q, k, v, positions, frequencies, scale=shape.attention_scale, threads=model.options.threads)
    return time.perf_counter() - begun


def _key(model: Model) -> str:
    """Names this model, this machine and how it is used."""
    options = model.options
    parts: tuple[object, ...] = (
        model.package.fingerprint, options.threads, cpu_name(), kernels.active_variant(), options.settings.storage,
    )  # fmt: skip
    if options.device != "cpu":
        parts = (*parts, options.device)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

