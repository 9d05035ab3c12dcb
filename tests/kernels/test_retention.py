"""Retention scores go where their pairs go: pages, forks, pruning, roll-back, marks and saved blobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.kernels.reference import CacheReference

Array = NDArray[Any]
PAGE = kernels.PAGE_TOKENS
HEADS, KV_HEADS, SIZE = 4, 2, 16
FREQUENCIES = (100.0 ** (-np.arange(8) / 8)).astype(np.float32)
SHAPE: dict[str, Any] = {"layers": 2, "heads": HEADS, "kv_heads": KV_HEADS, "head_size": SIZE}


def make(**options: Any) -> kernels.KVCache:
    return kernels.KVCache(**{**SHAPE, "retention": True, **options})


def append(
    cache: kernels.KVCache, first: int, tokens: int, *, layers: int = 2, twin: CacheReference | None = None,
    **options: Any,
) -> Array:  # fmt: skip
    """Random pairs and scores into every layer, and into ``twin``; the last layer's attention."""
    rng = np.random.default_rng(first)
    places = np.arange(first, first + tokens)
    for layer in range(layers):
        q, k, v = (rng.normal(size=(tokens, heads, SIZE)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
        scores = rng.normal(size=(tokens, KV_HEADS)).astype(np.float32)
        given = {"retention": scores, **options}
        out = cache.attend(layer, q, k, v, places, FREQUENCIES, scale=0.25, **given)
        if twin is not None:
            twin.append(layer, k, v, places, scores)
    return out


def assert_like(cache: kernels.KVCache, twin: CacheReference) -> None:
    for layer in range(2):
        for head in range(KV_HEADS):
            held = twin.heads[layer][head]
            np.testing.assert_array_equal(cache.positions(layer, head), held.positions)
            found = cache.retention(layer, head)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, held.retention.astype(np.float32))


def new_twin() -> CacheReference:
    return CacheReference(2, KV_HEADS, SIZE, FREQUENCIES)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 17, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 3])
def test_scores_are_kept_with_their_pairs(storage: str, tokens: int) -> None:
    cache, twin = make(storage=storage), new_twin()
    append(cache, 0, tokens, twin=twin)
    append(cache, tokens, 5, twin=twin)
    assert_like(cache, twin)


def test_pruning_moves_them() -> None:
    cache, twin, rng = make(), new_twin(), np.random.default_rng(0)
    tokens = 3 * PAGE + 7
    append(cache, 0, tokens, twin=twin)
    cache.commit()
    kept = np.stack([np.sort(rng.choice(tokens, PAGE + 9, replace=False)) for _ in range(KV_HEADS)]).astype(np.int32)
    cache.retain_layer(0, list(kept))
    for head in range(KV_HEADS):
        twin.retain(0, head, kept[head])
    assert_like(cache, twin)
    append(cache, tokens, 3, twin=twin)
    assert_like(cache, twin)


def test_forks_have_their_own() -> None:
    cache, twin = make(), new_twin()
    append(cache, 0, PAGE + 5, twin=twin)
    cache.commit()
    child = cache.fork()
    append(child, PAGE + 5, 2)
    kept = np.arange(1, PAGE, dtype=np.int32)
    child.retain_layer(1, [kept] * KV_HEADS)
    assert_like(cache, twin)
    np.testing.assert_array_equal(child.retention(1, 0), twin.heads[1][0].retention[1:PAGE].astype(np.float32))


def test_rolled_back_and_forgotten_ones_are_gone() -> None:
    cache, twin = make(), new_twin()
    append(cache, 0, PAGE + 2, twin=twin)
    cache.commit()
    append(cache, PAGE + 2, 9)
    cache.rollback()
    assert_like(cache, twin)
    cache.forget_from(PAGE - 3)
    for layer in range(2):
        for head in range(KV_HEADS):
            twin.retain(layer, head, np.arange(PAGE - 3))
    append(cache, PAGE - 3, 6, twin=twin)
    assert_like(cache, twin)


def test_a_mark_brings_them_back() -> None:
    cache, twin = make(windows=[8, 0]), new_twin()
    append_windowed(cache, 0, 150, twin)
    before = [cache.retention(0, head) for head in range(KV_HEADS)]
    cache.mark()
    append_windowed(cache, 150, 300, None)
    assert cache.positions(0, 0)[0] > 150
    cache.forget_from(150)
    for head in range(KV_HEADS):
        np.testing.assert_array_equal(cache.retention(0, head), before[head])


def append_windowed(cache: kernels.KVCache, first: int, tokens: int, twin: CacheReference | None) -> None:
    rng = np.random.default_rng(first)
    for layer, window in enumerate((8, 0)):
        q, k, v = (rng.normal(size=(tokens, heads, SIZE)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
        scores = rng.normal(size=(tokens, KV_HEADS)).astype(np.float32)
        places = np.arange(first, first + tokens)
        cache.attend(layer, q, k, v, places, FREQUENCIES, scale=0.25, window=window, retention=scores)
    cache.commit()


def restored(cache: kernels.KVCache, tokens: int, **options: Any) -> kernels.KVCache:
    shape = {**SHAPE, "retention": True, **options}
    return kernels.KVCache.restored(**shape, tokens=tokens, blobs=[cache.save_layer(layer) for layer in range(2)])


@pytest.mark.parametrize("tokens", [1, PAGE, 2 * PAGE + 5])
def test_saved_and_restored(tokens: int) -> None:
    cache, twin = make(), new_twin()
    append(cache, 0, tokens, twin=twin)
    cache.commit()
    again = restored(cache, tokens)
    assert_like(again, twin)
    assert [again.save_layer(layer) for layer in range(2)] == [cache.save_layer(layer) for layer in range(2)]
    plain = kernels.KVCache(**SHAPE)
    append(plain, 0, tokens, retention=None)
    plain.commit()
    assert cache.layer_bytes(0) == plain.layer_bytes(0) + 4 * tokens * KV_HEADS
    cache.retain_layer(1, [np.arange(tokens // 2), np.arange(tokens)])
    assert_saved_ragged(cache, tokens)
    for one, other in ((cache, False), (plain, True)):
        with pytest.raises(ValueError, match="retention scores where none are kept, or the reverse"):
            restored(one, tokens, retention=other)


def assert_saved_ragged(cache: kernels.KVCache, tokens: int) -> None:
    """Heads that hold different numbers of tokens."""
    again = restored(cache, tokens)
    for head in range(KV_HEADS):
        np.testing.assert_array_equal(again.retention(1, head), cache.retention(1, head))
    versions = [int.from_bytes(cache.save_layer(layer)[:4], "little") for layer in range(2)]
    assert versions == [4, 4 if tokens // 2 == tokens else 5]


def test_a_blob_with_no_numbers_is_refused() -> None:
    cache = make(layers=1)
    append(cache, 0, 3, layers=1)
    cache.commit()
    blob = bytearray(cache.save_layer(0))
    blob[-4:] = np.float32(np.nan).tobytes()
    with pytest.raises(ValueError, match="retention scores are no numbers"):
        kernels.KVCache.restored(**{**SHAPE, "layers": 1, "retention": True}, tokens=3, blobs=[blob])


def test_without_retention_nothing_is_kept_for_it() -> None:
    plain, cache = kernels.KVCache(**SHAPE), make()
    out = append(plain, 0, 9)  # the graph gives some; this cache passes over them
    np.testing.assert_array_equal(out, append(cache, 0, 9))
    assert cache.page_bytes == plain.page_bytes + 4 * PAGE
    with pytest.raises(ValueError, match="keeps no retention scores"):
        plain.retention(0, 0)


def test_a_graph_without_it_is_refused() -> None:
    with pytest.raises(ValueError, match="the graph gives no retention, which the cache keeps"):
        append(make(), 0, 3, retention=None)
    with pytest.raises(ValueError, match="retention must be"):
        append(make(), 0, 3, retention=np.zeros((3, 1), np.float32))


ARCHIVE: dict[str, Any] = {
    "high": (8, 8, False, 0, False), "low": (8, 8, False, 0, False), "digest": 1, "sinks": 16, "recall_tokens": 64,
    "window": 64, "warm_limit_bytes": 1 << 30,
}  # fmt: skip


def test_what_comes_back_from_the_archive_is_the_first_to_go() -> None:
    cache = make(archive=ARCHIVE)
    append(cache, 0, 4 * PAGE)
    cache.commit()
    cache.archive(3 * PAGE)
    cache.drop_archived()
    cache.forget_from(3 * PAGE - 10)
    found = cache.retention(0, 1)
    assert found.size
    np.testing.assert_array_equal(found, np.finfo(np.float32).min)
