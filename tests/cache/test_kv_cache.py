"""The cache of a conversation: what pruning keeps, what it counts, and that a budget above the text is no budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.cache import CacheSettings, CacheShape, KVCache
from satchel.cache.scorers import find_scorer, scorer_names

Array = NDArray[Any]
SHAPE = CacheShape(layers=2, heads=4, kv_heads=2, head_size=16, scale=0.25)
# of each layer: the second one turns by another base, and only half of its dimensions
FREQUENCIES = [(100.0 ** (-np.arange(8) / 8)).astype(np.float32), (30.0 ** (-np.arange(4) / 4)).astype(np.float32)]
SINKS, WINDOW = 3, 5


@contextmanager
def opened(scorer: str = "snapkv", hot_tokens: int | None = None, **options: Any) -> Iterator[KVCache]:
    settings = CacheSettings(sinks=SINKS, window=WINDOW, scorer=scorer, storage="fp32")
    cache = KVCache(SHAPE, settings, hot_tokens=hot_tokens, **options)
    yield cache
    cache.close()


def native(cache: KVCache) -> kernels.KVCache:
    return cache._native


def read(cache: KVCache, tokens: int, seed: int = 0) -> Array:
    """One graph run's worth of attention: [layers, tokens, H, D]."""
    rng = np.random.default_rng(seed + cache.total_tokens)
    places = np.arange(cache.total_tokens, cache.total_tokens + tokens)
    outs = []
    for layer in range(SHAPE.layers):
        q, k, v = (rng.normal(size=(tokens, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
        scores = k[..., 0].copy()
        outs.append(
            native(cache).attend(layer, q, k, v, places, FREQUENCIES[layer], scale=SHAPE.scale, retention=scores)
        )
    cache.commit(tokens)
    return np.stack(outs)


def positions(cache: KVCache, layer: int, head: int) -> list[int]:
    return native(cache).read(layer, head)[2].tolist()


@pytest.mark.parametrize("scorer", scorer_names())
def test_demotion_keeps_sinks_window_and_the_best(scorer: str) -> None:
    with opened(scorer, hot_tokens=20) as cache, opened(scorer, hot_tokens=20) as twin:
        read(cache, 100)
        read(twin, 100)
        cache.demote()
        assert cache.held_tokens() == 20
        for layer in range(SHAPE.layers):
            scores = find_scorer(scorer).score(twin._view(layer))
            for head in range(SHAPE.kv_heads):
                kept = positions(cache, layer, head)
                assert kept[:SINKS] == list(range(SINKS))
                assert kept[-WINDOW:] == list(range(95, 100))
                middle = np.arange(SINKS, 95)
                best = middle[np.argsort(-scores[head, SINKS:95], kind="stable")[: 20 - SINKS - WINDOW]]
                assert kept[SINKS:-WINDOW] == sorted(best.tolist())


@pytest.mark.parametrize("scorer", ["snapkv", "expected-attention"])
def test_a_scorer_turns_queries_as_their_layer_does(scorer: str) -> None:
    """Gemma 3's windowed layers have another base, some of SmolLM3's have no rotary positions."""
    with opened(scorer) as cache:
        read(cache, 30)
        twin = cache.fork()
        for layer, frequencies in enumerate(FREQUENCIES):
            np.testing.assert_array_equal(twin._view(layer).frequencies, frequencies)
        twin.close()
        q, k = (np.ones((1, heads, 16), np.float32) for heads in (4, 2))
        native(cache).attend(1, q, k, k, np.array([30]), np.empty(0, np.float32), scale=SHAPE.scale)
        view = cache._view(1)
        assert view.frequencies.size == 0
        assert np.isfinite(find_scorer(scorer).score(view)).all()


@pytest.mark.parametrize("scorer", scorer_names())
def test_pruning_again_and_again(scorer: str) -> None:
    """The sinks stay the first tokens of all, the window moves, and no chunk grows the cache beyond its bound."""
    with opened(scorer, hot_tokens=40) as cache:
        for _ in range(6):
            read(cache, 30)
            assert cache.held_tokens() <= 70
            cache.demote()
            assert cache.held_tokens() <= 40
        assert cache.total_tokens == 180
        for layer in range(SHAPE.layers):
            for head in range(SHAPE.kv_heads):
                kept = positions(cache, layer, head)
                assert kept[:SINKS] == list(range(SINKS))
                assert kept[-WINDOW:] == list(range(175, 180))
                assert kept == sorted(set(kept))


def test_recency_keeps_the_newest() -> None:
    with opened("recency", hot_tokens=20) as cache:
        read(cache, 100)
        cache.demote()
        assert positions(cache, 1, 1) == [0, 1, 2, *range(83, 100)]


@pytest.mark.parametrize("scorer", scorer_names())
def test_a_budget_for_everything_is_the_full_cache(scorer: str) -> None:
    with opened(scorer, hot_tokens=None) as full, opened(scorer, hot_tokens=150) as budget:
        for tokens in (64, 1, 30, 55):
            np.testing.assert_array_equal(read(budget, tokens), read(full, tokens))
            budget.demote()
            full.demote()
        assert budget.held_tokens() == full.held_tokens() == 150
        assert budget.usage() == full.usage()


def test_nothing_happens_within_the_budget() -> None:
    with opened(hot_tokens=20) as cache:
        read(cache, 20)
        before = [positions(cache, 0, head) for head in range(2)]
        cache.demote()
        assert [positions(cache, 0, head) for head in range(2)] == before
        cache.demote(10)  # asked for explicitly
        assert cache.held_tokens() == 10


def test_the_least_budget_is_sinks_and_window() -> None:
    with opened("keydiff", hot_tokens=SINKS + WINDOW) as cache:
        read(cache, 100)
        cache.demote()
        assert positions(cache, 0, 0) == [0, 1, 2, *range(95, 100)]


def test_usage_counts_pages_and_tokens() -> None:
    with opened("recency", hot_tokens=64) as cache:
        assert cache.usage().to_json() == {
            "hot_bytes": 0, "warm_bytes": 0, "cold_bytes": 0, "digest_bytes": 0, "hot_tokens": 0, "total_tokens": 0,
            "lost_tokens": 0, "flash_bytes_read": 0,
        }  # fmt: skip
        read(cache, 65)
        page = native(cache).page_bytes
        assert (cache.usage().hot_bytes, cache.usage().hot_tokens) == (2 * 4 * page, 65)
        cache.demote()
        assert (cache.usage().hot_bytes, cache.usage().hot_tokens, cache.usage().total_tokens) == (4 * page, 64, 65)


def test_rollback_keeps_the_count() -> None:
    with opened() as cache:
        read(cache, 10)
        zeros = np.zeros((4, 4, 16), np.float32)
        native(cache).attend(
            0, zeros, zeros[:, :2], zeros[:, :2], np.arange(10, 14), FREQUENCIES[0], scale=1.0
        )
        cache.rollback()
        assert (cache.total_tokens, cache.held_tokens()) == (10, 10)


def test_forks_are_pruned_apart() -> None:
    with opened("recency", hot_tokens=20) as cache:
        read(cache, 50)
        branch = cache.fork()
        branch.demote()
        assert (cache.held_tokens(), branch.held_tokens()) == (50, 20)
        read(branch, 5)
        assert (cache.total_tokens, branch.total_tokens) == (50, 55)
        assert positions(cache, 0, 0) == list(range(50))
        branch.hot_tokens = 10
        assert cache.hot_tokens == 20
        branch.close()
        assert not cache.closed
        read(cache, 5)


def test_closing() -> None:
    with opened() as cache:
        read(cache, 10)
        branch = cache.fork()
        cache.close()
        assert cache.closed
        assert not branch.closed
        with pytest.raises(ValueError, match="closed"):
            cache.usage()
        read(branch, 10)
        branch.close()
        cache.close()


def test_a_cache_that_starts_whole_can_be_given_a_budget_later() -> None:
    """What a conversation does that outgrows the memory limit."""
    for scorer in scorer_names():
        with opened(scorer, hot_tokens=None) as cache:
            read(cache, 100)
            cache.hot_tokens = 30
            cache.demote()
            assert cache.held_tokens() == 30
