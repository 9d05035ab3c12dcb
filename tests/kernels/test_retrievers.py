"""The retrievers' native digests: which blocks are chosen, against the NumPy twin; clusters; and the tokens' order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.kernels import reference
from satchel.kernels import reference_retrievers as twin

Array = NDArray[Any]
HEADS, KV_HEADS, SIZE = 4, 2, 32
GROUP = HEADS // KV_HEADS
ROTATION = twin.Rotation(100.0 ** (-np.arange(12) / 12), 1.25)  # 24 of 32 dimensions turn
SCALE = 0.25
SINKS, ARCHIVED, TOKENS = 16, 1024, 1040
KINDS = {"mean": twin.MEAN, "min-max": twin.MIN_MAX, "channels": twin.CHANNELS, "cluster": twin.CLUSTER}
PAIRS = 5


def make(kind: str, *, observed_queries: int = 0, **settings: Any) -> kernels.KVCache:
    form = settings.pop("form", (16, 16, False, 0, False))
    archive = {
        "high": form, "low": form, "digest": KINDS[kind], "channels": PAIRS, "sinks": SINKS, "recall_tokens": 64,
        "window": 16, "warm_limit_bytes": 1 << 40, **settings,
    }  # fmt: skip
    return kernels.KVCache(
        layers=1, heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, observed_queries=observed_queries, archive=archive
    )


def document(seed: int = 0, tokens: int = TOKENS) -> tuple[Array, Array, Array]:
    """Queries, keys and values before RoPE; some channels of the keys lie far from zero, as real ones do."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(tokens, heads, SIZE)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    spread = rng.uniform(0.2, 2.0, (KV_HEADS, SIZE))
    k = k * spread + rng.normal(size=(KV_HEADS, SIZE)) * (rng.random((KV_HEADS, SIZE)) < 0.2) * 5
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def attend(cache: kernels.KVCache, pairs: tuple[Array, Array, Array], first: int) -> Array:
    positions = np.arange(first, first + len(pairs[0]))
    frequencies = ROTATION.frequencies.astype(np.float32)
    out = cache.attend(0, *pairs, positions, frequencies, scale=SCALE, attention_factor=ROTATION.factor)
    cache.commit()
    return out


def archived(cache: kernels.KVCache, pairs: tuple[Array, Array, Array], until: int = ARCHIVED) -> kernels.KVCache:
    attend(cache, pairs, 0)
    cache.archive(until)
    cache.drop_archived()
    return cache


def turned_queries(q: Array, last: int, kv: int) -> Array:
    rows = q[0, kv * GROUP : (kv + 1) * GROUP]
    return ROTATION.turn(rows, np.full(GROUP, last)) * SCALE


def expected_votes(kind: str, cache: kernels.KVCache, pairs: tuple[Array, Array, Array], question: tuple[Array, ...],
                   kv: int, reach: int = 0) -> Array:  # fmt: skip
    """The twin's votes for all blocks, after ``pairs`` were read and ``question`` (one token) came."""
    keys, last = pairs[1][:, kv].astype(np.float64), len(pairs[0])
    basis = twin.make_basis(KINDS[kind], ROTATION, keys[SINKS:ARCHIVED], PAIRS)
    rows = turned_queries(question[0], last, kv)
    order, logits = cache.archive_order(0, kv), []
    sinks_at = max(0, last + 1 - reach) if reach else 0
    for page in range(ARCHIVED // twin.PAGE):
        slots = order[page * twin.PAGE : (page + 1) * twin.PAGE]
        framed = ROTATION.turn(keys[slots], slots - page * twin.PAGE).reshape(twin.BLOCKS, twin.TOKENS, SIZE)
        seen = max(page * twin.PAGE, sinks_at + SINKS if sinks_at else 0)
        logits.append(twin.page_logits(KINDS[kind], basis, framed, ROTATION.back(rows, seen)))
    hot = np.concatenate([keys[:SINKS], keys[ARCHIVED:], question[1][:, kv]])
    places = np.concatenate([np.arange(SINKS) + sinks_at, np.arange(ARCHIVED, last + 1)])
    hot_logits = rows @ ROTATION.turn(hot, places).T
    return twin.votes(np.concatenate(logits, axis=1), np.log(np.exp(hot_logits).sum(axis=1)))


@pytest.mark.parametrize("variant", kernels.variants())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reach", [0, 500])
def test_the_choice_is_the_twins(kind: str, variant: str, reach: int) -> None:
    before = kernels.active_variant()
    kernels.select_variant(variant)
    try:
        for seed in range(3):
            pairs, question = document(seed), tuple(x * 2 for x in document(seed + 50, 1))
            cache = archived(make(kind, reach=reach), pairs)
            attend(cache, question, TOKENS)
            for kv in range(KV_HEADS):
                expected = expected_votes(kind, cache, pairs, question, kv, reach)
                expected[: SINKS // 16] = -1
                chosen = cache.recalled(0, kv)
                assert chosen == sorted(set(chosen))
                assert len(chosen) == 4
                best = np.sort(expected)[::-1]
                # rounding may exchange two codes that are as near: a block in a hundred of the votes of the last one
                assert (expected[chosen] >= 0.97 * best[3]).all()
                assert set(np.flatnonzero(expected > 1.05 * best[4])) <= set(chosen)
    finally:
        kernels.select_variant(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reach", [0, 500])
def test_a_planted_block_is_found(kind: str, reach: int) -> None:
    pairs, question = document(7), document(8, 1)
    for block in (1, 17, 30, 63):  # beside the sinks; far; the end of a page; the newest
        q, k, v = (x.copy() for x in pairs)
        page, sinks_at = block // 16, max(0, TOKENS + 1 - reach) if reach else 0
        seen = max(page * twin.PAGE, sinks_at + SINKS if sinks_at else 0)
        for kv in range(KV_HEADS):
            wanted = turned_queries(question[0], TOKENS, kv).mean(axis=0)
            wanted *= 25 / np.linalg.norm(wanted)
            for position in range(block * 16, block * 16 + 16):
                at = seen + position - page * twin.PAGE
                k[position, kv] = ROTATION.back(wanted[None], at)[0]
        cache = archived(make(kind, reach=reach), (q, k, v))
        attend(cache, question, TOKENS)
        for kv in range(KV_HEADS):
            slots = cache.archive_order(0, kv).reshape(-1, 16)[cache.recalled(0, kv)]
            assert set(range(block * 16, block * 16 + 16)) <= set(slots.ravel())


@pytest.mark.parametrize("kind", ["min-max", "channels"])
def test_one_token_among_others_is_found(kind: str) -> None:
    """What a mean hides: a single key of a block that the query matches."""
    (q, k, v), question = document(9), document(10, 1)
    for kv in range(KV_HEADS):
        wanted = turned_queries(question[0], TOKENS, kv).mean(axis=0)
        k[405, kv] = ROTATION.back(wanted[None] * (25 / np.linalg.norm(wanted)), 405)[0]
    cache = archived(make(kind), (q, k, v))
    attend(cache, question, TOKENS)
    assert all(405 // 16 in cache.recalled(0, kv) for kv in range(KV_HEADS))


@pytest.mark.parametrize("observed", [0, 64])
def test_channels_are_where_queries_look(observed: int) -> None:
    """Keys differ most in some pairs of channels, queries have something in others only."""
    (q, k, v), question = document(11), document(12, 1)
    looked_at = np.isin(np.arange(SIZE), [4, 5, 6, 16, 17, 18])  # the pairs 4, 5 and 6
    k[..., ~looked_at] *= 6
    q[..., ~looked_at] = 0
    question[0][..., ~looked_at] = 0
    for kv in range(KV_HEADS):
        wanted = turned_queries(question[0], TOKENS, kv).mean(axis=0)
        k[405, kv, looked_at] = ROTATION.back(wanted[None] * (25 / np.linalg.norm(wanted)), 405)[0, looked_at]
    cache = archived(make("channels", observed_queries=observed, channels=3), (q, k, v))
    attend(cache, question, TOKENS)
    found = [405 // 16 in cache.recalled(0, kv) for kv in range(KV_HEADS)]
    assert found == [bool(observed)] * KV_HEADS


# --- clusters


def test_clusters_are_of_equal_size_and_nearer_than_neighbours() -> None:
    pairs = document(3)
    cache = archived(make("cluster"), pairs)
    for kv in range(KV_HEADS):
        order = cache.archive_order(0, kv)
        np.testing.assert_array_equal(np.sort(order), np.arange(ARCHIVED))
        np.testing.assert_array_equal(order[:SINKS], np.arange(SINKS))  # they stay where they are
        assert (np.diff(order.reshape(-1, 16)) > 0).all()
        for page in range(ARCHIVED // twin.PAGE):
            slots = order[page * twin.PAGE : (page + 1) * twin.PAGE]
            assert set(slots // twin.PAGE) == {page}
            found, plain = (
                twin.spherical_loss(ROTATION.turn(pairs[1][at, kv], at - page * twin.PAGE).reshape(16, 16, SIZE))
                for at in (slots, np.sort(slots))
            )
            assert found < 0.9 * plain


def test_clusters_find_what_was_mixed() -> None:
    """16 directions, shuffled over a page: every cluster is one of them."""
    rng = np.random.default_rng(4)
    q, k, v = document(4, 256)
    topics = rng.permutation(np.repeat(np.arange(16), 16))
    directions = rng.normal(size=(16, SIZE)) * 5
    for position in range(256):
        k[position] = ROTATION.back((directions[topics[position]] + rng.normal(size=SIZE) * 0.1)[None], position)[0]
    cache = archived(make("cluster", sinks=0), (q, k, v), 256)
    groups = topics[cache.archive_order(0, 0)].reshape(16, 16)
    assert (groups == groups[:, :1]).mean() > 0.85  # k-means may stop at a mixture of two


def test_clusters_come_in_whole_pages() -> None:
    cache = make("cluster")
    attend(cache, document(5), 0)
    with pytest.raises(ValueError, match="whole steps of 256"):
        cache.archive(320)
    assert cache.archived_until == 0
    cache.archive(512)
    assert cache.archived_until == 512


# --- what does not depend on the retriever


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [(16, 16, False, 0, False), (8, 8, False, 0, False)])
def test_read_gives_the_tokens_in_order(kind: str, form: tuple[Any, ...]) -> None:
    _, k, v = pairs = document(6)
    cache = archived(make(kind, form=form), pairs)
    for kv in range(KV_HEADS):
        keys, values = cache.read_archive(0, kv)
        np.testing.assert_allclose(keys, k[:ARCHIVED, kv], atol=0.01 if form[0] == 16 else 0.2)
        np.testing.assert_allclose(values, v[:ARCHIVED, kv], atol=0.01 if form[0] == 16 else 0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("still_hot", [False, True])
def test_recall_of_everything_is_full_attention(kind: str, still_hot: bool) -> None:
    pairs, question = document(13), document(14, 3)
    cache = make(kind, recall_tokens=ARCHIVED)
    attend(cache, pairs, 0)
    cache.archive(ARCHIVED)
    if still_hot:  # some archived tokens, of each head others: they must not count twice
        for kv in range(KV_HEADS):
            kept = np.sort(np.random.default_rng(kv).permutation(np.arange(SINKS, ARCHIVED))[:200])
            cache.retain(0, kv, np.concatenate([kept, np.arange(ARCHIVED, TOKENS)]).astype(np.int32))
    else:
        cache.drop_archived()
    out = attend(cache, question, TOKENS)
    places = np.arange(TOKENS + 3)
    q = reference.apply_rope(question[0], places[TOKENS:], ROTATION.frequencies, ROTATION.factor)
    k = np.concatenate([pairs[1], question[1]])
    expected, _ = reference.attention(
        q, reference.apply_rope(k, places, ROTATION.frequencies, ROTATION.factor),
        np.concatenate([pairs[2], question[2]]), places[TOKENS:], places, scale=SCALE,
    )  # fmt: skip
    np.testing.assert_allclose(out, expected, atol=0.01)


def test_clusters_beyond_reach_keep_their_distances() -> None:
    """All archived pages are seen from one place, over one another."""
    reach = 300
    pairs, question = document(15), document(16, 1)
    out = attend(archived(make("cluster", recall_tokens=ARCHIVED, reach=reach), pairs), question, TOKENS)
    sinks_at = TOKENS + 1 - reach
    places = np.concatenate([
        np.arange(SINKS) + sinks_at,
        [max(p // 256 * 256, sinks_at + SINKS) + p % 256 for p in range(SINKS, ARCHIVED)],
        np.arange(ARCHIVED, TOKENS + 1),
    ])  # fmt: skip
    q = reference.apply_rope(question[0], [TOKENS], ROTATION.frequencies, ROTATION.factor)
    k = reference.apply_rope(np.concatenate([pairs[1], question[1]]), places, ROTATION.frequencies, ROTATION.factor)
    v = np.concatenate([pairs[2], question[2]])
    seen = np.zeros(len(places))  # recalled keys are before every query, wherever they are put
    expected, _ = reference.attention(q, k, v, [0], seen, scale=SCALE)
    np.testing.assert_allclose(out, expected, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_forks_and_forgetting(kind: str) -> None:
    pairs, more, others = document(17), document(18, 512), document(19, 512)
    cache = archived(make(kind), pairs, 512)
    fork = cache.fork()
    for each, tail in ((fork, more), (cache, others)):  # both go on, from pages that they share
        attend(each, tail, TOKENS)
        each.archive(1280)
        each.drop_archived()
    for each, tail in ((fork, more), (cache, others)):
        whole = archived(make(kind), tuple(np.concatenate(x) for x in zip(pairs, tail, strict=True)), 512)
        whole.archive(1280)
        for kv in range(KV_HEADS):
            np.testing.assert_array_equal(each.archive_order(0, kv), whole.archive_order(0, kv))
            for got, wanted in zip(each.read_archive(0, kv), whole.read_archive(0, kv), strict=True):
                np.testing.assert_array_equal(got, wanted)
    step = 256 if kind == "cluster" else 64
    fork.forget_from(700)
    assert fork.archived_until == (700 - 16) // step * step
    for kv in range(KV_HEADS):
        np.testing.assert_array_equal(fork.positions(0, kv), np.arange(fork.archived_until, 700))
        keys, values, _ = fork.read(0, kv, rotated=False)
        np.testing.assert_allclose(keys, pairs[1][fork.archived_until : 700, kv], atol=0.02)
        np.testing.assert_allclose(values, pairs[2][fork.archived_until : 700, kv], atol=0.02)
        assert cache.archived_until == 1280
