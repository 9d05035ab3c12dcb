"""Every scorer: the same checks over all of them, and one made-up layer that each must rank as its paper says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel.cache.scorers import LayerView, find_scorer, scorer_names
from satchel.cache.scorers.base import rotate
from satchel.cache.scorers.snapkv import pool
from satchel.kernels import reference

Array = NDArray[Any]
TOKENS, SIZE, KV_HEADS, HEADS, QUERIES = 200, 16, 2, 4, 8
FREQUENCIES = (1e4 ** (-np.arange(8) / 8)).astype(np.float32)


def make_view(seed: int = 0, queries: int = QUERIES) -> LayerView:
    """A random layer: keys after RoPE, the last queries before it."""
    rng = np.random.default_rng(seed)
    places = np.sort(rng.choice(10 * TOKENS, (TOKENS,), replace=False)).astype(np.int32)
    return LayerView(
        keys=rng.normal(size=(KV_HEADS, TOKENS, SIZE)).astype(np.float32),
        values=rng.normal(size=(KV_HEADS, TOKENS, SIZE)).astype(np.float32),
        positions=np.stack([places] * KV_HEADS),
        queries=rng.normal(size=(queries, HEADS, SIZE)).astype(np.float32),
        query_positions=places[len(places) - queries :],
        frequencies=FREQUENCIES,
        scale=SIZE**-0.5,
        retention=rng.normal(size=(KV_HEADS, TOKENS)).astype(np.float32),
    )


@dataclass(frozen=True)
class Row:
    """``prepare(view)`` plants a token; ``best`` says which index must then come out first of the middle ones."""

    prepare: Callable[[LayerView], None]
    best: int
    among: tuple[int, int] = (20, 180)


PLANTED = 77


def plant_outlier_key(view: LayerView) -> None:
    view.keys[:] = 0.05 * view.keys + np.array([1, 2, *[0] * (SIZE - 2)], np.float32)
    view.keys[:, PLANTED] *= -1


def plant_key_of_the_last_queries(view: LayerView) -> None:
    """All queries of a head point the same way after RoPE; the planted key lies there."""
    wanted = np.full((len(view.queries), HEADS, SIZE), 2.0, np.float32)
    back = rotate(wanted, -view.query_positions, FREQUENCIES)
    view.queries[:] = back
    view.keys[:, PLANTED] = 2.0


def plant_key_of_the_mean_query(view: LayerView) -> None:
    """The mean query, turned to the next positions: only slow dimensions keep their direction."""
    view.queries[:] *= 0.05
    view.queries[..., 7] += 3.0  # pairs 7 and 15 turn slowest
    ahead = int(view.query_positions[-1]) + 256
    mean = np.zeros((1, 1, SIZE), np.float32)
    mean[..., 7] = 3.0
    view.keys[:] *= 0.05
    view.keys[:, PLANTED] = 3 * rotate(mean, np.array([ahead], np.int32), FREQUENCIES)[0, 0]


def plant_foretold_pair(view: LayerView) -> None:
    assert view.retention is not None
    view.retention[:, PLANTED] = 9.0


def nothing(view: LayerView) -> None:
    del view


# One row per scorer.
ROWS: dict[str, Row] = {
    "recency": Row(nothing, 179),
    "keydiff": Row(plant_outlier_key, PLANTED),
    "snapkv": Row(plant_key_of_the_last_queries, PLANTED),
    "expected-attention": Row(plant_key_of_the_mean_query, PLANTED),
    "kvzap": Row(plant_foretold_pair, PLANTED),
}


def test_every_scorer_has_a_row() -> None:
    assert set(ROWS) == set(scorer_names())


@pytest.mark.parametrize("name", scorer_names())
def test_shape_type_and_finite(name: str) -> None:
    scorer = find_scorer(name)
    assert scorer.name == name
    assert scorer.paper
    view = make_view(queries=max(scorer.observed_queries, 1))
    scores = scorer.score(view)
    assert scores.shape == (KV_HEADS, TOKENS)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert scores.flags.writeable


@pytest.mark.parametrize("name", scorer_names())
def test_ranking(name: str) -> None:
    row, view = ROWS[name], make_view()
    row.prepare(view)
    scores = find_scorer(name).score(view)[:, slice(*row.among)]
    near = 2 if name == "snapkv" else 0  # pooling spreads the score over its neighbours
    for best in scores.argmax(axis=1) + row.among[0]:
        assert abs(best - row.best) <= near


@pytest.mark.parametrize("name", scorer_names())
def test_the_view_stays_as_it_was(name: str) -> None:
    view, again = make_view(), make_view()
    find_scorer(name).score(view)
    for field in ("keys", "values", "positions", "queries", "query_positions", "frequencies", "retention"):
        np.testing.assert_array_equal(getattr(view, field), getattr(again, field))


@pytest.mark.parametrize("name", scorer_names())
def test_heads_are_scored_apart(name: str) -> None:
    view = make_view()
    other = replace(view, keys=view.keys.copy(), values=view.values.copy(), queries=view.queries.copy())
    other.keys[1], other.values[1], other.queries[:, 2:] = 7.0, 3.0, -1.0
    scorer = find_scorer(name)
    np.testing.assert_allclose(scorer.score(other)[0], scorer.score(view)[0], rtol=1e-5)


@pytest.mark.parametrize("name", scorer_names())
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_keys_of_any_size_give_finite_scores(name: str, size: float) -> None:
    view = make_view()
    view.keys[:] *= size
    view.keys[:, 3] = 0.0
    assert np.isfinite(find_scorer(name).score(view)).all()


@pytest.mark.parametrize("name", scorer_names())
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 6])
def test_few_tokens(name: str, tokens: int) -> None:
    """Fewer tokens than snapkv's pooling window, and one query alone."""
    view = make_view(queries=1)
    last = slice(TOKENS - tokens, TOKENS)
    assert view.retention is not None
    few = replace(
        view, keys=view.keys[:, last], values=view.values[:, last], positions=view.positions[:, last],
        retention=view.retention[:, last],
    )  # fmt: skip
    scores = find_scorer(name).score(few)
    assert scores.shape == (KV_HEADS, tokens)
    assert np.isfinite(scores).all()


def test_recency_follows_positions() -> None:
    view = make_view()
    assert (np.diff(find_scorer("recency").score(view), axis=1) > 0).all()


def test_expected_attention_prefers_longer_values() -> None:
    view = make_view()
    view.keys[:] = view.keys[:, :1]  # all keys alike
    view.values[:, 50] *= 10
    assert (find_scorer("expected-attention").score(view).argmax(axis=1) == 50).all()


def test_snapkv_is_the_mean_attention_of_the_last_queries() -> None:
    """Written out in float64 with the kernels' reference."""
    view = make_view()
    got = find_scorer("snapkv").score(view)
    one_hot = np.eye(TOKENS)[:, None, :].repeat(KV_HEADS, axis=1)
    queries = reference.apply_rope(view.queries, view.query_positions, FREQUENCIES)
    weights, _ = reference.attention(
        np.concatenate([queries, np.zeros((QUERIES, HEADS, TOKENS - SIZE))], axis=-1),
        np.concatenate([view.keys.swapaxes(0, 1), np.zeros((TOKENS, KV_HEADS, TOKENS - SIZE))], axis=-1),
        one_hot, view.query_positions, view.positions[0], scale=view.scale,
    )  # fmt: skip
    for head in range(KV_HEADS):
        mean = weights[:, 2 * head : 2 * head + 2].mean(axis=(0, 1))
        smooth = [mean[max(i - 2, 0) : i + 3].mean() for i in range(TOKENS)]
        np.testing.assert_allclose(got[head], smooth, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 50])
def test_pooling(length: int) -> None:
    values = np.random.default_rng(0).random(length).astype(np.float32)
    expected = [values[max(i - 2, 0) : i + 3].mean() for i in range(length)]
    np.testing.assert_allclose(pool(values), expected, rtol=1e-5)


def test_rotation_equals_the_reference() -> None:
    x = np.random.default_rng(1).normal(size=(5, 3, 20)).astype(np.float32)
    places = np.array([0, 1, 7, 500, 30_000], np.int32)
    np.testing.assert_allclose(rotate(x, places, FREQUENCIES), reference.apply_rope(x, places, FREQUENCIES), atol=1e-5)
