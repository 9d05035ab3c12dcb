"""The twins themselves: cases worked out by hand, and invariants that any attention must keep."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel.kernels import reference
from satchel.kernels.reference import CacheReference

Array = NDArray[Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def frequencies(dims: int, base: float = 10000.0) -> Array:
    return np.array([base ** (-2 * i / dims) for i in range(dims // 2)])


# --- RoPE


def test_rope_quarter_turn_by_hand() -> None:
    x = np.array([[[1.0, 2.0, 3.0, 4.0]]])
    turned = reference.apply_rope(x, [1], [math.pi / 2, 0.0])
    np.testing.assert_allclose(turned, [[[-3.0, 2.0, 1.0, 4.0]]], atol=1e-15)  # (1, 3) turns into (-3, 1)


def test_rope_leaves_position_zero_and_the_rest_dimensions_alone(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 2, 10))
    np.testing.assert_array_equal(reference.apply_rope(x, [0, 0, 0], frequencies(6)), x)
    turned = reference.apply_rope(x, [5, 6, 7], frequencies(6), attention_factor=2.0)
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])


def test_rope_equals_complex_multiplication(rng: np.random.Generator) -> None:
    x, positions, turns = rng.normal(size=(4, 3, 8)), np.array([0, 1, 17, 9000]), frequencies(8)
    as_complex = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, None, None] * turns)
    expected = np.concatenate([as_complex.real, as_complex.imag], axis=-1)
    np.testing.assert_allclose(reference.apply_rope(x, positions, turns), expected, atol=1e-12)
    scaled = reference.apply_rope(x, positions, turns, attention_factor=1.25)
    np.testing.assert_allclose(scaled, 1.25 * expected, atol=1e-12)


def test_rope_products_depend_on_the_distance_only(rng: np.random.Generator) -> None:
    q, k = rng.normal(size=(1, 1, 8)), rng.normal(size=(1, 1, 8))
    turns = frequencies(8)

    def product(at: int, to: int) -> float:
        turned = reference.apply_rope(q, [at], turns) * reference.apply_rope(k, [to], turns)
        return float(turned.sum())

    assert product(12, 5) == pytest.approx(product(1007, 1000), abs=1e-9)
    assert product(12, 5) != pytest.approx(product(13, 5), abs=1e-3)


# --- attention


def test_attention_by_hand() -> None:
    """Logits 0 and log 3: weights 1/4 and 3/4."""
    q = np.array([[[1.0, 0.0]]])
    k = np.array([[[0.0, 5.0]], [[2 * math.log(3.0), 7.0]]])
    v = np.array([[[4.0, 0.0]], [[0.0, 8.0]]])
    out, log_sum = reference.attention(q, k, v, [1], [0, 1], scale=0.5)
    np.testing.assert_allclose(out, [[[1.0, 6.0]]], atol=1e-15)
    np.testing.assert_allclose(log_sum, [[math.log(4.0)]], atol=1e-15)


def test_softcap_by_hand() -> None:
    q, k, v = np.array([[[3.0]]]), np.array([[[2.0]], [[0.0]]]), np.array([[[1.0]], [[0.0]]])
    out, _ = reference.attention(q, k, v, [1], [0, 1], scale=1.0, softcap=4.0)
    capped = math.exp(4 * math.tanh(6 / 4))
    np.testing.assert_allclose(out, [[[capped / (capped + 1)]]], atol=1e-15)


@pytest.mark.parametrize(
    ("window", "seen"),
    [(0, [0, 1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_which_keys_a_query_sees(window: int, seen: list[int]) -> None:
    """Equal logits: the output is the mean of one-hot values, so it names the visible keys."""
    values = np.eye(7)[:, None, :]
    zeros = np.zeros((7, 1, 7))
    out, log_sum = reference.attention(
        np.zeros((1, 1, 7)), zeros, values, [4], np.arange(7), scale=1.0, window=window
    )
    expected = np.isin(np.arange(7), seen) / len(seen)
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-15)
    assert log_sum[0, 0] == pytest.approx(math.log(len(seen)))


def test_a_query_that_sees_nothing() -> None:
    out, log_sum = reference.attention(
        np.ones((1, 2, 3)), np.ones((2, 1, 3)), np.ones((2, 1, 3)), [1], [2, 3], scale=1.0
    )
    assert not out.any()
    assert np.isneginf(log_sum).all()


def test_query_heads_read_their_group_of_kv_heads(rng: np.random.Generator) -> None:
    q, k, v = rng.normal(size=(3, 6, 4)), rng.normal(size=(5, 2, 4)), rng.normal(size=(5, 2, 4))
    at, to = np.array([2, 3, 4]), np.arange(5)
    out, log_sums = reference.attention(q, k, v, at, to, scale=0.5)
    for head in range(6):
        source = head // 3
        alone = reference.attention(
            q[:, head : head + 1], k[:, source : source + 1], v[:, source : source + 1], at, to, scale=0.5
        )
        np.testing.assert_allclose(out[:, head : head + 1], alone[0], atol=1e-14)
        np.testing.assert_allclose(log_sums[:, head : head + 1], alone[1], atol=1e-14)


def test_attention_equals_a_masked_matrix_softmax(rng: np.random.Generator) -> None:
    """Written the other way round: one matrix of logits, minus infinity where it is hidden."""
    tokens, size = 9, 6
    q, k, v = (rng.normal(size=(tokens, 1, size)) for _ in range(3))
    logits = q[:, 0] @ k[:, 0].T / math.sqrt(size)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    logits[(distance < 0) | (distance >= 4)] = -np.inf
    weights = np.exp(logits)
    expected = weights / weights.sum(axis=1, keepdims=True) @ v[:, 0]
    places = np.arange(tokens)
    out, log_sums = reference.attention(q, k, v, places, places, scale=1 / math.sqrt(size), window=4)
    np.testing.assert_allclose(out[:, 0], expected, atol=1e-14)
    np.testing.assert_allclose(log_sums[:, 0], np.log(weights.sum(axis=1)), atol=1e-14)


def test_the_order_of_keys_does_not_matter_and_huge_logits_do_no_harm(rng: np.random.Generator) -> None:
    q, k, v = rng.normal(size=(2, 2, 4)), 1e4 * rng.normal(size=(8, 2, 4)), rng.normal(size=(8, 2, 4))
    order = rng.permutation(8)
    out, log_sums = reference.attention(q, k, v, [7, 5], np.arange(8), scale=1.0)
    again = reference.attention(q, k[order], v[order], [7, 5], order, scale=1.0)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(again[0], out, atol=1e-12)
    np.testing.assert_allclose(again[1], log_sums, rtol=1e-12)


def test_heads_with_their_own_tokens_equal_each_head_alone(rng: np.random.Generator) -> None:
    q = rng.normal(size=(2, 4, 4))
    places = [np.array([0, 3, 4]), np.array([1, 2, 4, 6])]
    k = [rng.normal(size=(len(p), 4)) for p in places]
    v = [rng.normal(size=(len(p), 4)) for p in places]
    out, log_sums = reference.attention(q, k, v, [4, 6], places, scale=0.3)
    for head in range(2):
        mine = slice(2 * head, 2 * head + 2)
        alone = reference.attention(
            q[:, mine], k[head][:, None], v[head][:, None], [4, 6], places[head], scale=0.3
        )
        np.testing.assert_allclose(out[:, mine], alone[0], atol=1e-14)
        np.testing.assert_allclose(log_sums[:, mine], alone[1], atol=1e-14)


@pytest.mark.parametrize("cuts", [[4], [1, 2, 9], [0], [10]])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (3.0, 5)])
def test_merged_parts_equal_the_whole(
    rng: np.random.Generator, cuts: list[int], softcap: float, window: int
) -> None:
    q, k, v = rng.normal(size=(10, 4, 8)), rng.normal(size=(10, 2, 8)), rng.normal(size=(10, 2, 8))
    places, settings = np.arange(10), {"scale": 0.7, "softcap": softcap, "window": window}
    whole = reference.attention(q, k, v, places, places, **settings)  # type: ignore[arg-type]
    parts = [
        reference.attention(q, k[part], v[part], places, part, **settings)  # type: ignore[arg-type]
        for part in np.split(places, cuts)
    ]
    merged = reference.merge(parts)
    np.testing.assert_allclose(merged[0], whole[0], atol=1e-13)
    np.testing.assert_allclose(merged[1], whole[1], atol=1e-13)
    twice = reference.merge([reference.merge(parts[:1]), reference.merge(parts[1:])])
    np.testing.assert_allclose(twice[0], whole[0], atol=1e-13)


def test_merging_parts_that_see_nothing() -> None:
    nothing = (np.zeros((1, 1, 2)), np.full((1, 1), -np.inf))
    something = (np.ones((1, 1, 2)), np.zeros((1, 1)))
    out, log_sum = reference.merge([nothing, nothing])
    assert not out.any()
    assert np.isneginf(log_sum).all()
    np.testing.assert_array_equal(reference.merge([nothing, something])[0], something[0])


# --- the cache


def filled(rng: np.random.Generator, chunk: int, tokens: int = 13) -> tuple[CacheReference, Array, Array]:
    """A cache of one layer read in chunks; the outputs of those reads, and the queries."""
    cache = CacheReference(1, 2, 8, frequencies(8))
    q, k, v = (rng.normal(size=(tokens, heads, 8)) for heads in (4, 2, 2))
    outs = []
    for first in range(0, tokens, chunk):
        part = slice(first, min(first + chunk, tokens))
        places = np.arange(tokens)[part]
        cache.append(0, k[part], v[part], places)
        outs.append(cache.attention(0, q[part], places, scale=0.35, window=6)[0])
    return cache, np.concatenate(outs), q


@pytest.mark.parametrize("chunk", [1, 2, 5, 12])
def test_reading_in_chunks_equals_reading_at_once(chunk: int) -> None:
    _, whole, _ = filled(np.random.default_rng(3), 13)
    _, chunked, _ = filled(np.random.default_rng(3), chunk)
    np.testing.assert_allclose(chunked, whole, atol=1e-14)


def test_the_cache_holds_both_forms_of_a_key(rng: np.random.Generator) -> None:
    cache, _, _ = filled(rng, 4)
    for head in cache.heads[0]:
        again = reference.apply_rope(head.raw_keys[:, None], head.positions, frequencies(8))[:, 0]
        np.testing.assert_array_equal(head.keys, again)
        np.testing.assert_array_equal(head.positions, np.arange(13))


def test_heads_retain_their_own_tokens(rng: np.random.Generator) -> None:
    cache, _, q = filled(rng, 13)
    before = [head.values for head in cache.heads[0]]
    everything, _ = cache.attention(0, q[-1:], [12], scale=0.35)
    cache.retain(0, 0, [0, 5, 12])
    assert [cache.tokens(0, head) for head in range(2)] == [3, 13]
    np.testing.assert_array_equal(cache.heads[0][0].values, before[0][[0, 5, 12]])
    np.testing.assert_array_equal(cache.heads[0][0].positions, [0, 5, 12])
    less, _ = cache.attention(0, q[-1:], [12], scale=0.35)
    np.testing.assert_array_equal(less[:, 2:], everything[:, 2:])  # the other head is untouched
    assert np.abs(less[:, :2] - everything[:, :2]).max() > 1e-3
    cache.retain(0, 0, [1])  # indices count from what is held now
    np.testing.assert_array_equal(cache.heads[0][0].positions, [5])


def test_retained_and_dropped_tokens_merge_to_everything(rng: np.random.Generator) -> None:
    whole, _, q = filled(rng, 13)
    expected = whole.attention(0, q[-1:], [12], scale=0.35)
    parts = []
    for indices in ([0, 1, 7, 12], [2, 3, 4, 5, 6, 8, 9, 10, 11]):
        part, _, _ = filled(np.random.default_rng(11), 13)
        for head in range(2):
            part.retain(0, head, indices)
        parts.append(part.attention(0, q[-1:], [12], scale=0.35))
    merged = reference.merge(parts)
    np.testing.assert_allclose(merged[0], expected[0], atol=1e-13)
    np.testing.assert_allclose(merged[1], expected[1], atol=1e-13)


def test_forgetting_everything_is_allowed(rng: np.random.Generator) -> None:
    cache, _, q = filled(rng, 13)
    for head in range(2):
        cache.retain(0, head, [])
    out, log_sums = cache.attention(0, q[-1:], [12], scale=0.35)
    assert not out.any()
    assert np.isneginf(log_sums).all()


@pytest.mark.parametrize("indices", [[-1], [13], [3, 3], [4, 2]])
def test_retaining_what_is_not_there_is_a_mistake(rng: np.random.Generator, indices: list[int]) -> None:
    cache, _, _ = filled(rng, 13)
    with pytest.raises(ValueError, match=r"must ascend within 0\.\.12"):
        cache.retain(0, 1, indices)


# --- linear layers


def test_activations_by_hand() -> None:
    codes, scales = reference.quantize_activations([[1.0, -2.0, 0.5, 0.0, 0.0, 0.0]], 3, bits=3)
    np.testing.assert_allclose(scales, [[2 / 3, 0.0]])
    np.testing.assert_array_equal(codes, [[2, -3, 1, 0, 0, 0]])  # 1.5 and 0.75 in units of 2/3


@pytest.mark.parametrize("bits", [8, 16])
def test_activations_are_off_by_half_a_step_at_most(rng: np.random.Generator, bits: int) -> None:
    x = rng.normal(size=(5, 64)) * 10.0 ** rng.integers(-3, 4, size=(5, 1))
    codes, scales = reference.quantize_activations(x, 16, bits)
    assert np.abs(codes).max() == 2 ** (bits - 1) - 1
    steps = np.repeat(scales, 16, axis=1)
    assert (np.abs(codes * steps - x) <= steps * (0.5 + 1e-9)).all()


def test_dequantize_and_embedding_by_hand() -> None:
    codes = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    scales, mins = np.array([[1.0, 10.0], [0.5, 2.0]]), np.array([[0.0, -1.0], [5.0, 0.0]])
    expected = np.array([[0.0, 1.0, 19.0, 29.0], [6.5, 6.0, 2.0, 0.0]])
    np.testing.assert_array_equal(reference.dequantize(codes, scales, mins), expected)
    np.testing.assert_array_equal(reference.embedding([1, 0, 1], codes, scales, mins), expected[[1, 0, 1]])


@pytest.mark.parametrize("with_mins", [False, True])
def test_linear_equals_loops(rng: np.random.Generator, with_mins: bool) -> None:
    codes, scales = rng.integers(-8, 8, size=(5, 12)), rng.random(size=(5, 3))
    mins = rng.normal(size=(5, 3)) if with_mins else None
    x, bias = rng.normal(size=(2, 12)), rng.normal(size=5)
    y = reference.linear(x, codes, scales, mins, bias)
    for row in range(2):
        for column in range(5):
            total = bias[column]
            for i in range(12):
                low = 0.0 if mins is None else mins[column, i // 4]
                total += x[row, i] * (scales[column, i // 4] * codes[column, i] + low)
            assert y[row, column] == pytest.approx(total, abs=1e-12)


def test_linear_with_rounded_activations_scales_integer_sums_by_block(rng: np.random.Generator) -> None:
    codes, scales, mins = rng.integers(0, 16, size=(3, 64)), rng.random(size=(3, 2)), rng.normal(size=(3, 2))
    x = rng.normal(size=(4, 64))
    rounded, steps = reference.quantize_activations(x, 32, bits=8)
    expected = np.zeros((4, 3))
    for block in range(2):
        part = slice(32 * block, 32 * block + 32)
        sums = rounded[:, part] @ codes[:, part].T  # exact integers
        expected += sums * steps[:, block, None] * scales[:, block]
        expected += (rounded[:, part].sum(axis=1) * steps[:, block])[:, None] * mins[:, block]
    y = reference.linear(x, codes, scales, mins, activation_bits=8)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    exact = reference.linear(x, codes, scales, mins)
    weights = np.abs(reference.dequantize(codes, scales))
    assert (np.abs(y - exact) <= np.repeat(steps, 32, axis=1) / 2 @ weights.T + 1e-9).all()
    fine = reference.linear(x, codes, scales, mins, activation_bits=16)
    assert np.abs(fine - exact).max() < np.abs(y - exact).max() / 50


def test_swiglu_by_hand() -> None:
    gate, up = [0.0, math.log(3.0), -1000.0, 1000.0], [5.0, 2.0, 1.0, 3.0]
    expected = [0.0, 1.5 * math.log(3.0), 0.0, 3000.0]
    np.testing.assert_allclose(reference.gated(gate, up), expected, atol=1e-12)


def test_geglu_by_hand() -> None:
    """GELU is x times the normal distribution function; its approximation is within 1e-3 of it."""
    gate = np.array([-1000.0, -3.0, -0.5, 0.0, 0.5, 1.0, 3.0, 1000.0])
    normal = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in gate])
    np.testing.assert_allclose(reference.gated(gate, np.full(8, 2.0), "gelu_tanh"), 2 * gate * normal, atol=2e-3)


@pytest.mark.parametrize(("normalized", "shares"), [(True, (0.4, 0.6)), (False, (1 / 3, 1 / 2))])
def test_experts_by_hand(normalized: bool, shares: tuple[float, float]) -> None:
    """Three experts of width 1 that give 40, 400 and 4; the first and the last are used."""
    logits = np.log([[2.0, 1.0, 3.0]])
    gate, up = np.full((3, 1, 2), 500.0), np.full((3, 1, 2), 0.002)
    down = np.array([10.0, 100.0, 1.0])[:, None, None] * np.ones((3, 2, 1))
    found = reference.mixture_of_experts(np.ones((1, 2)), logits, gate, up, down, used=2, normalized=normalized)
    np.testing.assert_allclose(found, np.full((1, 2), shares[0] * 40 + shares[1] * 4), rtol=1e-12)
