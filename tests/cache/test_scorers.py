"""Every scorer: the same checks over all of them, and one made-up layer that each must rank as its paper says."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel.cache.scorers import LayerView, find_scorer, scorer_names
from satchel.cache.scorers.actqkv import PROBES, activation_bias
from satchel.cache.scorers.attention import attention_sum, seen_by
from satchel.cache.scorers.base import rotate
from satchel.cache.scorers.keyformer import gumbel_noise, temperature
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
        value_norms=rng.uniform(0.5, 1.5, size=(KV_HEADS, TOKENS)).astype(np.float32),
        positions=np.stack([places] * KV_HEADS),
        queries=rng.normal(size=(queries, HEADS, SIZE)).astype(np.float32),
        query_positions=places[len(places) - queries :],
        frequencies=FREQUENCIES,
        scale=SIZE**-0.5,
        kept=np.zeros((KV_HEADS, TOKENS), np.float32),
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


def plant_a_heavy_hitter(view: LayerView) -> None:
    """Pairs of another token please the last queries; the planted one has pleased all queries before."""
    plant_key_of_the_last_queries(view)
    view.keys[:, [PLANTED, 120]] = view.keys[:, [120, PLANTED]]
    view.kept[:, PLANTED] = 3e4  # of which no count of queries at this place gives as many
    object.__setattr__(view, "scored_until", int(view.query_positions[0]))


def plant_a_key_of_outstanding_queries(view: LayerView) -> None:
    """Most queries are alike and look at token 120; one in the middle is unlike them and looks elsewhere."""
    back = rotate(np.full((len(view.queries), HEADS, SIZE), 2.0, np.float32), -view.query_positions, FREQUENCIES)
    view.queries[:] = 0.01 * view.queries + 0.5 * back.mean(axis=0)
    view.queries[len(view.queries) // 2] = -back[len(view.queries) // 2]
    view.keys[:, PLANTED] = -2.0


def plant_a_short_key(view: LayerView) -> None:
    view.keys[:, PLANTED] *= 0.1


def plant_foretold_pair(view: LayerView) -> None:
    assert view.retention is not None
    view.retention[:, PLANTED] = 9.0


def plant_a_compiled_pair(view: LayerView) -> None:
    """All but the last were read twice."""
    view.kept[:] = 0.1
    view.kept[:, PLANTED] = 0.2
    object.__setattr__(view, "scored_until", int(view.positions[0, 150]))


def nothing(view: LayerView) -> None:
    del view


# One row per scorer.
ROWS: dict[str, Row] = {
    "recency": Row(nothing, 179),
    "keydiff": Row(plant_outlier_key, PLANTED),
    "snapkv": Row(plant_key_of_the_last_queries, PLANTED),
    "expected-attention": Row(plant_key_of_the_mean_query, PLANTED),
    "h2o": Row(plant_a_heavy_hitter, PLANTED),
    "keyformer": Row(plant_a_heavy_hitter, PLANTED),
    "finch": Row(plant_key_of_the_last_queries, PLANTED),
    "actqkv": Row(plant_a_key_of_outstanding_queries, PLANTED),
    "knorm": Row(plant_a_short_key, PLANTED),
    "kvzap": Row(plant_foretold_pair, PLANTED),
    "locret": Row(plant_foretold_pair, PLANTED),
    "attention-gate": Row(plant_foretold_pair, PLANTED),
    "kvzip": Row(plant_a_compiled_pair, PLANTED),
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
    for field in (
        "keys", "value_norms", "positions", "queries", "query_positions", "frequencies", "kept", "retention",
    ):  # fmt: skip
        np.testing.assert_array_equal(getattr(view, field), getattr(again, field))


@pytest.mark.parametrize("name", scorer_names())
def test_heads_are_scored_apart(name: str) -> None:
    view = make_view()
    other = replace(view, keys=view.keys.copy(), value_norms=view.value_norms.copy(), queries=view.queries.copy())
    other.keys[1], other.value_norms[1], other.queries[:, 2:] = 7.0, 3.0, -1.0
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
    few = replace(view, keys=view.keys[:, last], value_norms=view.value_norms[:, last],
                  positions=view.positions[:, last], kept=view.kept[:, last],
                  retention=view.retention[:, last])  # fmt: skip
    scores = find_scorer(name).score(few)
    assert scores.shape == (KV_HEADS, tokens)
    assert np.isfinite(scores).all()


def test_recency_follows_positions() -> None:
    view = make_view()
    assert (np.diff(find_scorer("recency").score(view), axis=1) > 0).all()


def test_expected_attention_prefers_longer_values() -> None:
    view = make_view()
    view.keys[:] = view.keys[:, :1]  # all keys alike
    view.value_norms[:, 50] = 15
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


def best(name: str, view: LayerView, among: slice = slice(20, 180)) -> list[int]:
    """Which token each KV head would keep first."""
    return [int(index) + among.start for index in find_scorer(name).score(view)[:, among].argmax(axis=1)]


def attention(view: LayerView, row_temperature: float = 1.0, bias: Array | None = None) -> Array:
    """The attention weights [H, W, T] in float64, written out."""
    queries = reference.apply_rope(view.queries, view.query_positions, FREQUENCIES).astype(np.float64)
    weights = np.zeros((HEADS, len(queries), TOKENS))
    for head in range(HEADS):
        kv_head = head * KV_HEADS // HEADS
        logits = queries[:, head] @ view.keys[kv_head].T.astype(np.float64) * view.scale
        logits = (logits + (0 if bias is None else bias[kv_head])) / row_temperature
        logits[view.positions[kv_head] > view.query_positions[:, None]] = -np.inf
        weights[head] = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights[head] /= weights[head].sum(axis=1, keepdims=True)
    return weights


def test_the_attention_that_is_summed() -> None:
    view, rng = make_view(), np.random.default_rng(5)
    weights, bias = rng.random((KV_HEADS, QUERIES)), rng.normal(size=(KV_HEADS, TOKENS))
    got = attention_sum(view, weights=weights.astype(np.float32), bias=bias.astype(np.float32), temperature=1.5)
    expected = attention(view, 1.5, bias).reshape(KV_HEADS, 2, QUERIES, TOKENS)
    np.testing.assert_allclose(got, np.einsum("kgwt,kw->kt", expected, weights), rtol=1e-4, atol=1e-7)
    none = replace(view, queries=view.queries[:0], query_positions=view.query_positions[:0])
    assert not attention_sum(none).any()
    sees = (view.positions[:, None] <= view.query_positions[None, :, None]).sum(axis=1)
    np.testing.assert_array_equal(seen_by(view), sees)


@pytest.mark.parametrize("name", ["h2o", "keyformer"])
def test_mass_grows_by_each_query_that_could_see_a_pair(name: str) -> None:
    """The last three queries are new; 20 tokens were read since the scores were given."""
    view = make_view()
    until = int(view.query_positions[-1]) + 1
    since = int(view.query_positions[-3])
    view.kept[:] = np.random.default_rng(1).random(view.kept.shape)
    noise = gumbel_noise(view.positions) if name == "keyformer" else None
    heat = temperature(view) if name == "keyformer" else 1.0
    got = find_scorer(name).score(replace(view, scored_until=since))
    new = attention(view, heat, noise)[:, -3:].reshape(KV_HEADS, 2, 3, TOKENS).sum(axis=1)
    for head in range(KV_HEADS):
        for token in (0, 50, TOKENS - 2, TOKENS - 1):
            place = int(view.positions[head, token])
            mean = new[head, :, token].sum() / (view.query_positions[-3:] >= place).sum()
            expected = view.kept[head, token] + mean * (until - max(place, since))
            np.testing.assert_allclose(got[head, token], expected, rtol=1e-4)


def test_no_query_counts_twice() -> None:
    view = make_view()
    first = find_scorer("h2o").score(view)
    again = find_scorer("h2o").score(replace(view, kept=first, scored_until=int(view.query_positions[-1]) + 1))
    np.testing.assert_array_equal(again, first)


def test_h2o_remembers_what_snapkv_has_forgotten() -> None:
    view = make_view()
    plant_a_heavy_hitter(view)
    assert best("h2o", view) == [PLANTED, PLANTED]
    assert all(abs(index - 120) <= 2 for index in best("snapkv", view))


def test_keyformer_gives_noise_and_warmth() -> None:
    view = make_view()
    assert temperature(view) == pytest.approx(2 - TOKENS / (int(view.query_positions[-1]) + 1))
    dense = replace(view, positions=np.tile(np.arange(TOKENS, dtype=np.int32), (KV_HEADS, 1)),
                    query_positions=np.arange(TOKENS - QUERIES, TOKENS, dtype=np.int32))  # fmt: skip
    assert temperature(dense) == 1.0
    noise = gumbel_noise(np.arange(100_000, dtype=np.int32))
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.03)
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.02
    np.testing.assert_array_equal(gumbel_noise(np.array([7, 99_999], np.int32)), noise[[7, 99_999]])
    # Keys alike: H2O sees no difference where all see them, noise decides; the same each time.
    dense.keys[:] = 1.0
    h2o, keyformer = (find_scorer(name).score(dense)[:, :100] for name in ("h2o", "keyformer"))
    np.testing.assert_allclose(h2o, h2o[:, :1] * np.arange(TOKENS, TOKENS - 100, -1) / TOKENS, rtol=1e-4)
    assert keyformer[0].argmax() == (gumbel_noise(np.arange(100, dtype=np.int32)) * 1.0).argmax()
    np.testing.assert_array_equal(find_scorer("keyformer").score(dense)[:, :100], keyformer)


def test_finch_frees_attention_of_how_many_keys_a_query_sees() -> None:
    """Where keys are all alike, each pair has its fair share: 1, wherever it stands. snapkv prefers early ones."""
    view = make_view()
    view.keys[:] = 1.0
    np.testing.assert_allclose(find_scorer("finch").score(view), 1.0, rtol=1e-4)
    last = find_scorer("snapkv").score(view)[:, -1]
    assert (last < 0.5 * find_scorer("snapkv").score(view)[:, 0]).all()


def test_finch_is_not_smoothed() -> None:
    view = make_view()
    plant_key_of_the_last_queries(view)
    finch, snapkv = (find_scorer(name).score(view) for name in ("finch", "snapkv"))
    assert (finch[:, PLANTED + 1] < 0.1 * finch[:, PLANTED]).all()
    assert (snapkv[:, PLANTED + 1] > 0.5 * snapkv[:, PLANTED]).all()
    weights = attention(view) * (view.positions[0] <= view.query_positions[:, None]).sum(axis=1)[:, None]
    expected = weights.reshape(KV_HEADS, 2 * QUERIES, TOKENS).mean(axis=1)
    np.testing.assert_allclose(finch[:, : -QUERIES], expected[:, : -QUERIES], rtol=1e-4)


def test_actqkv_listens_to_the_few_that_stand_out() -> None:
    """Sixty queries look at one token, four unlike them at another: snapkv follows the many."""
    view = make_view(queries=64)
    back = rotate(np.full((64, HEADS, SIZE), 2.0, np.float32), -view.query_positions, FREQUENCIES)
    rng = np.random.default_rng(2)
    view.queries[:] = back + rng.normal(scale=0.1, size=back.shape)
    odd = [3, 20, 41, 63]
    view.queries[odd] = -3 * back[odd]
    view.keys[:] *= 0.1
    view.keys[:, 120], view.keys[:, PLANTED] = 1.0, -2.0
    early = slice(20, 130)  # which all queries see
    biases = activation_bias(view.queries, KV_HEADS)
    assert biases.shape == (KV_HEADS, 64)
    for head in range(KV_HEADS):
        assert set(odd) <= set(np.argsort(-biases[head])[:PROBES].tolist())
    weights = find_scorer("actqkv").score(view)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-4)  # the mean of rows that sum to 1
    assert best("actqkv", view, early) == [PLANTED, PLANTED]
    assert all(abs(index - 120) <= 2 for index in best("snapkv", view, early))


def test_the_activation_bias_is_a_mean_squared_z_score() -> None:
    queries = np.random.default_rng(4).normal(2, 3, size=(40, HEADS, SIZE)).astype(np.float32)
    z = (queries - queries.mean(axis=0)) / queries.std(axis=0)
    expected = np.stack([(z[:, :2] ** 2).mean(axis=(1, 2)), (z[:, 2:] ** 2).mean(axis=(1, 2))])
    np.testing.assert_allclose(activation_bias(queries, KV_HEADS), expected, rtol=1e-4)


def test_knorm_keeps_short_keys_where_keydiff_keeps_unlike_ones() -> None:
    view = make_view()
    plant_outlier_key(view)
    plant = 150
    view.keys[:, plant] *= 0.1
    assert best("knorm", view) == [plant, plant]
    assert best("keydiff", view) == [PLANTED, PLANTED]


def test_locret_prefers_longer_values() -> None:
    view = make_view()
    assert view.retention is not None
    view.retention[:] = -3.0
    view.value_norms[:, 50] = 15
    view.value_norms[:, 51] = 0.0
    scores = find_scorer("locret").score(view)
    assert (scores.argmax(axis=1) == 50).all()
    assert (scores.argmin(axis=1) == 51).all()
    assert np.isfinite(scores).all()
    view.retention[:, 60] = -3.0 + np.log(40)  # more attention than the longest value makes up for
    assert (find_scorer("locret").score(view).argmax(axis=1) == 60).all()


def test_kvzip_ranks_what_came_later_below_the_text_and_by_age() -> None:
    view = make_view()
    plant_a_compiled_pair(view)
    scores = find_scorer("kvzip").score(view)
    np.testing.assert_array_equal(scores[:, :150], view.kept[:, :150])
    assert (scores[:, 150:] < 0).all()
    assert (np.diff(scores[:, 150:], axis=1) > 0).all()
    assert find_scorer("kvzip").ranks_after_reading
    assert [name for name in scorer_names() if find_scorer(name).ranks_after_reading] == ["kvzip"]


@pytest.mark.parametrize("name", scorer_names())
def test_what_a_scorer_declares(name: str) -> None:
    """Memory is planned by it: of each scorer less than the peak of a layer's score."""
    scorer = find_scorer(name)
    assert scorer.kept_bytes_per_token(KV_HEADS) == (8 * KV_HEADS if scorer.keeps_scores else 0)
    tokens, heads, size = 3_000, 4, 32
    rng = np.random.default_rng(0)
    queries = max(scorer.observed_queries, 1)
    keys = rng.normal(size=(heads, tokens, size)).astype(np.float32)
    norms = np.ones((heads, tokens), np.float32)
    places = np.tile(np.arange(tokens, dtype=np.int32), (heads, 1))
    frequencies = (1e4 ** (-np.arange(size // 2) / 16)).astype(np.float32)
    tracemalloc.start()
    view = LayerView(keys.copy() if scorer.needs_pairs else keys[..., :0],
                     norms.copy() if scorer.needs_value_norms else norms[:, :0], places.copy(),
                     rng.normal(size=(queries, 8, size)).astype(np.float32), places[0, -queries:], frequencies, 0.1,
                     kept=np.zeros((heads, tokens), np.float32),
                     retention=np.zeros((heads, tokens), np.float32))  # fmt: skip
    scorer.score(view)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= scorer.scoring_bytes_per_token(heads, size) * tokens + 200_000


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 50])
def test_pooling(length: int) -> None:
    values = np.random.default_rng(0).random(length).astype(np.float32)
    expected = [values[max(i - 2, 0) : i + 3].mean() for i in range(length)]
    np.testing.assert_allclose(pool(values), expected, rtol=1e-5)


def test_rotation_equals_the_reference() -> None:
    x = np.random.default_rng(1).normal(size=(5, 3, 20)).astype(np.float32)
    places = np.array([0, 1, 7, 500, 30_000], np.int32)
    np.testing.assert_allclose(rotate(x, places, FREQUENCIES), reference.apply_rope(x, places, FREQUENCIES), atol=1e-5)
