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
from satchel.cache.scorers import LayerView, find_scorer, scorer_names

Array = NDArray[Any]
SHAPE = CacheShape(layers=2, heads=4, kv_heads=2, head_size=16, scale=0.25)
# of each layer: the second one turns by another base, and only half of its dimensions
FREQUENCIES = [(100.0 ** (-np.arange(8) / 8)).astype(np.float32), (30.0 ** (-np.arange(4) / 4)).astype(np.float32)]
SINKS, WINDOW = 3, 5


@contextmanager
def opened(
    scorer: str = "snapkv", hot_tokens: int | None = None, head_budgets: str = "uniform", **options: Any
) -> Iterator[KVCache]:  # fmt: skip
    settings = CacheSettings(
        sinks=SINKS, window=WINDOW, scorer=scorer, storage="fp32", head_budgets=head_budgets
    )  # fmt: skip
    cache = KVCache(SHAPE, settings, hot_tokens=hot_tokens, **options)
    yield cache
    cache.close()


def native(cache: KVCache) -> kernels.KVCache:
    return cache._native


def shown(cache: KVCache, layer: int) -> LayerView:
    """What the scorer would be shown now."""
    return cache._ranking.view(cache._native, layer)


def read(cache: KVCache, tokens: int, seed: int = 0, keys: tuple[float, float] = (1, 1)) -> Array:
    """One graph run's worth of attention: [layers, tokens, H, D]. ``keys``: how long those of each KV head are."""
    rng = np.random.default_rng(seed + cache.total_tokens)
    places = np.arange(cache.total_tokens, cache.total_tokens + tokens)
    outs = []
    for layer in range(SHAPE.layers):
        q, k, v = (rng.normal(size=(tokens, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
        k *= np.array(keys, np.float32)[:, None]
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
            scores = find_scorer(scorer).score(shown(twin, layer))
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
            np.testing.assert_array_equal(shown(twin, layer).frequencies, frequencies)
        twin.close()
        q, k = (np.ones((1, heads, 16), np.float32) for heads in (4, 2))
        native(cache).attend(1, q, k, k, np.array([30]), np.empty(0, np.float32), scale=SHAPE.scale)
        view = shown(cache, 1)
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


# --- Scores that are kept


KEEPING = [name for name in scorer_names()
           if find_scorer(name).keeps_scores and not find_scorer(name).ranks_after_reading]  # fmt: skip


@pytest.mark.parametrize("scorer", KEEPING)
def test_kept_scores_stay_with_their_pairs(scorer: str) -> None:
    with opened(scorer, hot_tokens=40) as cache:
        read(cache, 100)
        before = shown(cache, 1)
        assert not before.kept.any()
        assert before.scored_until == 0
        scores = find_scorer(scorer).score(before)
        cache.demote()
        read(cache, 30)
        view = shown(cache, 1)
        assert view.scored_until == 100
        for head in range(SHAPE.kv_heads):
            kept = positions(cache, 1, head)[:40]
            np.testing.assert_array_equal(view.kept[head, :40], scores[head, kept])
        assert not view.kept[:, 40:].any()
        mass = view.kept.copy()
        cache.demote()
        assert (shown(cache, 1).kept[:, : SINKS + 1] > mass[:, : SINKS + 1]).all()
        assert cache._ranking.saved_bytes() == 2 * 2 * (8 + 40 * 8)  # nothing is kept of pairs that are gone


@pytest.mark.parametrize("scorer", KEEPING)
def test_kept_scores_of_forks_go_apart(scorer: str) -> None:
    with opened(scorer, hot_tokens=40) as cache:
        read(cache, 100)
        cache.demote()
        mine = shown(cache, 0)
        branch = cache.fork()
        np.testing.assert_array_equal(shown(branch, 0).kept, mine.kept)
        read(branch, 50, seed=9)
        branch.demote()
        np.testing.assert_array_equal(shown(cache, 0).kept, mine.kept)
        assert (shown(branch, 0).scored_until, shown(cache, 0).scored_until) == (150, 100)
        branch.close()


@pytest.mark.parametrize("scorer", KEEPING)
def test_kept_scores_of_what_is_unread_are_forgotten(scorer: str) -> None:
    """A cancelled question's tokens are read again as others at the same positions."""
    with opened(scorer, hot_tokens=60) as cache:
        read(cache, 100)
        cache.demote()
        cache.forget_from(97)
        view = shown(cache, 0)
        assert view.scored_until == 97
        assert (view.kept > 0).all()
        read(cache, 5, seed=3)
        assert not shown(cache, 0).kept[:, -5:].any()


def test_a_heavy_hitter_of_old_chunks_outlives_a_new_one() -> None:
    """What the first chunk looks at is looked at no more: snapkv drops it, H2O does not."""
    ones = np.ones(16, np.float32)
    found = {}
    for scorer in ("h2o", "snapkv"):
        with opened(scorer, hot_tokens=20) as cache:
            for chunk in range(3):
                rng = np.random.default_rng(chunk)
                q, k, v = (rng.normal(scale=0.1, size=(80, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
                q += 2 * ones if chunk == 0 else -2 * ones
                k[10 + chunk] += 2 * ones if chunk == 0 else -0.2 * ones
                for layer in range(SHAPE.layers):
                    native(cache).attend(layer, q, k, v, np.arange(80 * chunk, 80 * chunk + 80),
                                         np.empty(0, np.float32), scale=SHAPE.scale)  # fmt: skip
                cache.commit(80)
                cache.demote()
            found[scorer] = 10 in positions(cache, 0, 0)
    assert found == {"h2o": True, "snapkv": False}


def test_scores_that_were_found_elsewhere() -> None:
    """A piece at a time; what is pruned, forked and cut back keeps them, and what has none ranks below, by age."""
    with opened("kvzip", hot_tokens=40) as cache:
        cache.hot_tokens = None
        read(cache, 100)
        assert cache.ranked_until == 0
        for first, end in ((0, 60), (60, 100)):
            cache.watch(first, end)
            read(cache, 30, seed=end)
            cache.keep_watched(first)
            cache.forget_from(100)
        assert cache.ranked_until == 100
        worth = [shown(cache, 1).kept[head] for head in range(SHAPE.kv_heads)]
        norms = [native(cache).value_norms(1, head, 0, 100) for head in range(SHAPE.kv_heads)]
        assert all(((each > 0) & (each <= norm)).all() for each, norm in zip(worth, norms, strict=True))
        assert not np.array_equal(worth[0], worth[1])
        cache.hot_tokens = 40
        cache.demote()
        read(cache, 30)
        branch = cache.fork()
        for each in (cache, branch):
            each.demote()
            assert each.ranked_until == 100
            for head in range(SHAPE.kv_heads):
                middle = np.arange(SINKS, 95)
                best = middle[np.argsort(-worth[head][middle], kind="stable")[:32]]
                left = np.concatenate([best, np.arange(95, 100)])  # the first window had no need of scores
                best = np.sort(left[np.argsort(-worth[head][left], kind="stable")[:32]])
                kept = positions(each, 1, head)
                assert kept == [*range(SINKS), *best.tolist(), *range(125, 130)]
                np.testing.assert_array_equal(shown(each, 1).kept[head, :-WINDOW], worth[head][kept[:-WINDOW]])
        branch.forget_from(90)
        assert (branch.ranked_until, cache.ranked_until) == (90, 100)
        branch.close()


# --- Budgets of heads


def pages_of(cache: KVCache, layer: int) -> int:
    return sum(-(-native(cache).tokens(layer, head) // kernels.PAGE_TOKENS) for head in range(SHAPE.kv_heads))


@pytest.mark.parametrize(("hot_tokens", "chunk"), [(300, 64), (320, 128), (257, 100), (130, 7), (60, 64)])
@pytest.mark.parametrize("scorer", scorer_names())
def test_adaptive_budgets_never_take_more_pages(scorer: str, hot_tokens: int, chunk: int) -> None:
    with (
        opened(scorer, hot_tokens=hot_tokens, head_budgets="adaptive") as adaptive,
        opened(scorer, hot_tokens=hot_tokens) as uniform,
    ):
        for step in range(6):
            for cache in (adaptive, uniform):
                read(cache, 150 if step == 0 else chunk, keys=(0.1, 3))
            for _ in range(2):
                assert adaptive.held_tokens() == uniform.held_tokens()
                assert adaptive.usage().hot_bytes <= uniform.usage().hot_bytes
                for layer in range(SHAPE.layers):
                    assert pages_of(adaptive, layer) <= pages_of(uniform, layer)
                adaptive.demote()
                uniform.demote()
        for layer in range(SHAPE.layers):
            for head in range(SHAPE.kv_heads):
                kept = positions(adaptive, layer, head)
                assert len(kept) >= min(0.2 * hot_tokens, len(kept) + 1)
                assert kept[:SINKS] == list(range(SINKS))
                assert kept[-WINDOW:] == list(range(adaptive.total_tokens - WINDOW, adaptive.total_tokens))
                assert kept == sorted(set(kept))


def test_the_head_that_looks_everywhere_gets_more() -> None:
    """AdaKV's rule: keys of length 0 share attention evenly, so that more pairs are needed for as much of it."""
    with opened("snapkv", hot_tokens=320, head_budgets="adaptive", limit_bytes=0) as cache:
        read(cache, 700, keys=(0.01, 4))
        cache.demote()
        for layer in range(SHAPE.layers):
            even, sharp = (native(cache).tokens(layer, head) for head in range(2))
            assert even + sharp == 640
            assert even > 320 > sharp >= 64
            assert (even - 320) % kernels.PAGE_TOKENS == 0
        branch = cache.fork()
        np.testing.assert_array_equal(read(branch, 40, seed=4), read(cache, 40, seed=4))
        branch.demote()
        assert (branch.held_tokens(), cache.held_tokens()) == (320, 360)
        cache.demote()
        for layer in range(SHAPE.layers):
            for head in range(SHAPE.kv_heads):
                assert positions(branch, layer, head) == positions(cache, layer, head)
        branch.close()


def test_adaptive_budgets_keep_to_the_limit_in_bytes() -> None:
    """The limit is exactly what the uniform plan takes at its fullest: the pages of budget and chunk."""
    probe = kernels.KVCache(layers=2, heads=4, kv_heads=2, head_size=16, storage="fp32")
    limit = 2 * 2 * -(-(300 + 100) // kernels.PAGE_TOKENS) * probe.page_bytes
    with opened("snapkv", hot_tokens=300, head_budgets="adaptive", limit_bytes=limit) as cache:
        read(cache, 400, keys=(0.01, 4))
        for chunk in range(12):
            cache.demote()
            read(cache, 100, keys=(0.01, 4) if chunk // 4 % 2 else (4, 0.01))  # now the one, now the other
            assert native(cache).pool_bytes <= limit


def test_budgets_after_a_cancelled_question() -> None:
    """Heads are cut back by different numbers; the next pruning puts the pages right."""
    with opened("snapkv", hot_tokens=200, head_budgets="adaptive") as cache:
        read(cache, 300, keys=(0.01, 4))
        cache.demote()
        read(cache, 100, keys=(4, 0.01))
        cache.demote()
        cache.forget_from(300)
        assert len({native(cache).tokens(0, head) for head in range(2)}) == 2
        read(cache, 150)
        cache.demote()
        assert cache.held_tokens() <= 200
        for layer in range(SHAPE.layers):
            assert pages_of(cache, layer) <= 2 * 4
