"""How heads share a budget: AdaKV's allocation in whole pages."""

from __future__ import annotations

import numpy as np
import pytest
from satchel import kernels
from satchel.cache.head_budgets import LEAST_SHARE, adaptive_budgets

PAGE = kernels.PAGE_TOKENS


def pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def falling(tokens: int, first: float, factor: float) -> np.ndarray:
    return (first * factor ** np.arange(tokens)).astype(np.float32)


def test_equal_heads_get_equal_budgets() -> None:
    scores = [falling(600, 1, 0.99)[np.random.default_rng(head).permutation(600)] for head in range(3)]
    assert adaptive_budgets(scores, 300, 20) == [300, 300, 300]


def test_what_moves_is_what_keeps_the_most() -> None:
    """Of all ways to share six pages, by trying all of them."""
    rng = np.random.default_rng(0)
    budget = 3 * PAGE
    for _ in range(20):
        scores = [rng.gamma(rng.uniform(0.1, 5), size=8 * PAGE).astype(np.float32) for _ in range(2)]
        best = [np.sort(values)[::-1] for values in scores]
        kept = {split: best[0][: split * PAGE].sum() + best[1][: (6 - split) * PAGE].sum() for split in range(1, 6)}
        split = max(kept, key=lambda pages: kept[pages])
        assert adaptive_budgets(scores, budget, 10) == [split * PAGE, (6 - split) * PAGE]


def test_each_keeps_a_fifth() -> None:
    scores = [falling(3000, 1e6, 1.0), falling(3000, 1e-6, 1.0)]
    low = adaptive_budgets(scores, 1000, 10)[1]
    assert LEAST_SHARE * 1000 <= low < LEAST_SHARE * 1000 + PAGE
    assert adaptive_budgets(scores, 1000, 700)[1] >= 700  # sinks and window


@pytest.mark.parametrize("budget", [1, 20, 63, 64, 65, 100, 500])
def test_no_more_pages_than_uniform_now_or_later(budget: int) -> None:
    rng = np.random.default_rng(budget)
    for _ in range(50):
        held = rng.integers(1, 900, size=4)
        held = np.maximum(held, rng.integers(0, 2) * budget)
        scores = [rng.gamma(rng.uniform(0.1, 5), size=size).astype(np.float32) for size in held]
        for values in scores:
            values[rng.random(values.size) < 0.05] = rng.choice([np.inf, -np.inf])
        found = adaptive_budgets(scores, budget, int(rng.integers(1, budget + 1)))
        assert all(0 < count <= size for count, size in zip(found, held, strict=True))
        for appended in range(2 * PAGE):
            assert sum(pages(count + appended) for count in found) <= 4 * pages(budget + appended)


def test_scores_of_any_sign() -> None:
    """KeyDiff's are cosines, knorm's are minus lengths; the larger keep their place."""
    scores = [-falling(500, 1, 1.001), -falling(500, 10, 1.001)]
    first, second = adaptive_budgets(scores, 250, 10)
    assert first > 250 > second
    assert first + second == 500
