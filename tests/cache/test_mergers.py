"""Every merger: what goes into what, and that nothing else changes."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.cache import CacheFullError, CacheSettings, CacheShape, KVCache
from satchel.cache.mergers import Merged, find_merger, merger_names

Array = NDArray[Any]
SIZE = 16
SHAPE = CacheShape(layers=1, heads=4, kv_heads=2, head_size=SIZE, scale=0.25)
NO_ROPE = np.empty(0, np.float32)


def pairs(tokens: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    keys, values = (rng.normal(size=(tokens, SIZE)).astype(np.float32) for _ in range(2))
    return keys, values


def indices(*tokens: int) -> Array:
    return np.array(tokens, np.int32)


@pytest.mark.parametrize("name", merger_names())
def test_only_targets_change(name: str) -> None:
    merger = find_merger(name)
    assert merger.name == name
    assert "arXiv" in merger.paper
    keys, values = pairs(300)
    before = keys.copy(), values.copy()
    targets, forgotten = np.arange(20, 60, dtype=np.int32), np.arange(60, 280, dtype=np.int32)
    merged = merger.merge(keys, values, targets, forgotten)
    assert set(merged.tokens.tolist()) <= set(targets.tolist())
    assert (np.diff(merged.tokens) > 0).all()
    for new, old in ((merged.keys, keys), (merged.values, values)):
        assert new.shape == (merged.tokens.size, SIZE)
        assert new.dtype == np.float32
        assert np.isfinite(new).all()
        assert (np.abs(new - old[merged.tokens]).max(axis=1) > 0).all()
    np.testing.assert_array_equal(keys, before[0])
    np.testing.assert_array_equal(values, before[1])


@pytest.mark.parametrize("name", merger_names())
def test_nothing_to_merge(name: str) -> None:
    keys, values = pairs(10)
    for targets, forgotten in ((indices(), indices(3, 4)), (indices(3, 4), indices())):
        merged = find_merger(name).merge(keys, values, targets, forgotten)
        assert merged.tokens.size == 0
        assert merged.keys.shape == merged.values.shape == (0, SIZE)


@pytest.mark.parametrize("name", merger_names())
def test_what_is_alike_stays_as_it_is(name: str) -> None:
    """A pair and its copies merge into the pair."""
    keys, values = pairs(4)
    keys, values = np.concatenate([keys, keys, keys]), np.concatenate([values, values, values])
    merged = find_merger(name).merge(keys, values, indices(0, 1, 2, 3), np.arange(4, 12, dtype=np.int32))
    np.testing.assert_array_equal(merged.tokens, [0, 1, 2, 3])
    np.testing.assert_allclose(merged.keys, keys[:4], rtol=1e-5)
    np.testing.assert_allclose(merged.values, values[:4], rtol=1e-5)


@pytest.mark.parametrize("name", merger_names())
def test_working_memory(name: str) -> None:
    tokens, size = 3000, 64
    rng = np.random.default_rng(0)
    tracemalloc.start()
    keys, values = (rng.normal(size=(tokens, size)).astype(np.float32) for _ in range(2))
    tracemalloc.reset_peak()
    merger = find_merger(name)
    merger.merge(keys, values, np.arange(64, 1000, dtype=np.int32), np.arange(1000, 2744, dtype=np.int32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= merger.merging_bytes_per_token(size) * tokens


def test_lookm_is_pivotal() -> None:
    """Two go into the first, however long their keys are; none into the second, whose direction is another."""
    keys = np.zeros((5, SIZE), np.float32)
    keys[0, 0], keys[1, 1] = 2, 1
    keys[2, :2], keys[3, :2] = (9, 3), (0.3, 0.1)
    keys[4, 1] = -1
    values = np.arange(5, dtype=np.float32)[:, None].repeat(SIZE, axis=1)
    merged: Merged = find_merger("lookm").merge(keys, values, indices(0, 1), indices(2, 3))
    np.testing.assert_array_equal(merged.tokens, [0])
    pivots = [(keys[0] + keys[2]) / 2, (keys[0] + keys[3]) / 2]
    np.testing.assert_allclose(merged.keys[0], (keys[0] + pivots[0] + pivots[1]) / 3, rtol=1e-6)
    np.testing.assert_allclose(merged.values[0], (0 + 1 + 1.5) / 3, rtol=1e-6)


# --- In the cache


def opened(merge: str, hot_tokens: int | None = 30, **options: Any) -> KVCache:
    settings = CacheSettings(
        sinks=3, window=5, scorer="knorm", storage="fp32", merge=merge, **options.pop("settings", {})
    )  # fmt: skip
    return KVCache(SHAPE, settings, hot_tokens=hot_tokens, **options)


def read(cache: KVCache, tokens: int) -> Array:
    rng = np.random.default_rng(cache.total_tokens)
    q, k, v = (rng.normal(size=(tokens, heads, SIZE)).astype(np.float32) for heads in (4, 2, 2))
    places = np.arange(cache.total_tokens, cache.total_tokens + tokens)
    out = cache._native.attend(0, q, k, v, places, NO_ROPE, scale=SHAPE.scale)
    cache.commit(tokens)
    return out


@pytest.mark.parametrize("head_budgets", ["uniform", "adaptive"])
@pytest.mark.parametrize("name", merger_names())
def test_the_cache_merges_what_it_forgets(name: str, head_budgets: str) -> None:
    options: dict[str, Any] = {"hot_tokens": 150, "settings": {"head_budgets": head_budgets}}
    merging, forgetting = opened(name, **options), opened("none", **options)
    for cache in (merging, forgetting):
        read(cache, 400)
    whole = [merging._native.read(0, head) for head in range(2)]
    for cache in (merging, forgetting):
        cache.demote()
    for head in range(2):
        keys, values, places = merging._native.read(0, head)
        plain = forgetting._native.read(0, head)
        np.testing.assert_array_equal(places, plain[2])
        kept = np.concatenate([np.arange(3), np.arange(len(places) - 5, len(places))])  # sinks and window
        np.testing.assert_array_equal(keys[kept], plain[0][kept])
        np.testing.assert_array_equal(values[kept], plain[1][kept])
        forgotten = np.setdiff1d(np.arange(400), places).astype(np.int32)
        expected = find_merger(name).merge(whole[head][0], whole[head][1], places[3:-5], forgotten)
        at = np.searchsorted(places, expected.tokens)
        assert at.size
        np.testing.assert_array_equal(keys[at], expected.keys)
        np.testing.assert_array_equal(values[at], expected.values)
        others = np.setdiff1d(np.arange(len(places)), at)
        np.testing.assert_array_equal(keys[others], plain[0][others])
    assert merging.usage() == forgetting.usage()


def test_forks_do_not_see_each_others_mergers() -> None:
    cache = opened("lookm", hot_tokens=200)
    read(cache, 300)
    branch = cache.fork()
    before = [part.copy() for part in cache._native.read(0, 1)]
    branch.demote()
    for old, now in zip(before, cache._native.read(0, 1), strict=True):
        np.testing.assert_array_equal(now, old)


def test_no_room_for_copies() -> None:
    page = kernels.KVCache(layers=1, heads=4, kv_heads=2, head_size=SIZE, storage="fp32").page_bytes
    cache = opened("lookm", hot_tokens=100, limit_bytes=2 * 4 * page)
    read(cache, 256)
    branch = cache.fork()
    with pytest.raises(CacheFullError):
        branch.demote()
    assert branch.held_tokens() == 256
    cache.close()
    branch.demote()
    assert branch.held_tokens() == 100


def test_overwriting_what_is_not_there() -> None:
    cache = kernels.KVCache(layers=1, heads=4, kv_heads=2, head_size=SIZE, storage="bf16")
    q, k = np.ones((70, 4, SIZE), np.float32), np.ones((70, 2, SIZE), np.float32)
    cache.attend(0, q, k, k, np.arange(70), NO_ROPE, scale=1.0)
    cache.commit()
    rows = np.full((2, SIZE), 0.5, np.float32)
    for wrong in (indices(3, 70), indices(-1, 3), indices(5, 5), indices(6, 5)):
        with pytest.raises(ValueError, match="indices must ascend"):
            cache.overwrite(0, 0, wrong, rows, rows)
    for keys, values in ((rows[:1], rows), (rows, rows[:, :8]), (rows, rows[0])):
        with pytest.raises(ValueError, match=r"\[tokens, head_size\]"):
            cache.overwrite(0, 0, indices(1, 2), keys, values)
    for layer, head in ((1, 0), (0, 2), (-1, 0)):
        with pytest.raises((IndexError, ValueError)):
            cache.overwrite(layer, head, indices(1, 2), rows, rows)
    twin = cache.fork()
    cache.overwrite(0, 1, indices(1, 69), rows, 2 * rows)
    keys, values, places = cache.read(0, 1)
    assert (keys[[1, 69]] == 0.5).all()
    assert (values[[1, 69]] == 1.0).all()
    assert (np.delete(keys, [1, 69], axis=0) == 1).all()
    np.testing.assert_array_equal(places, np.arange(70))
    assert (twin.read(0, 1)[0] == 1).all()
    assert (cache.read(0, 0)[0] == 1).all()
