"""What every retriever says of itself, against what the native archive holds."""

from __future__ import annotations

import numpy as np
import pytest
from satchel.cache import CacheSettings, CacheShape, KVCache
from satchel.cache.archive import ArchiveOptions
from satchel.cache.retrievers import find_retriever, retriever_names

# One row per retriever: bytes a token and KV head at D = 64, and tokens of a step.
ROWS = {"landmark": (4.25, 64), "minmax": (8.5, 64), "centroid": (6.0, 256), "channels": (14.0, 64), "none": (0.0, 64)}


def test_every_retriever_has_a_row() -> None:
    assert set(ROWS) == set(retriever_names())


@pytest.mark.parametrize("name", retriever_names())
def test_declared(name: str) -> None:
    retriever = find_retriever(name)
    assert retriever.name == name
    assert "arXiv" in retriever.paper
    assert (retriever.digest_bytes_per_token(64), retriever.step_tokens) == ROWS[name]


@pytest.mark.parametrize("name", retriever_names())
@pytest.mark.parametrize("codec", ["q8", "mikv"])
@pytest.mark.parametrize(("head_size", "rope_dims"), [(16, 16), (32, 24), (128, 128)])
def test_a_conversation(name: str, codec: str, head_size: int, rope_dims: int) -> None:
    """Digests take what they say; a window stays hot, and less than a step more; the tokens' values are unharmed."""
    rng = np.random.default_rng(1)
    frequencies = (100.0 ** (-np.arange(rope_dims // 2) / rope_dims * 2)).astype(np.float32)
    shape = CacheShape(1, 4, 2, head_size, 0.2)
    options = ArchiveOptions(codec, name, 16, 64, 128, 1, 0, 1 << 40)
    cache = KVCache(shape, CacheSettings(sinks=16, window=64), hot_tokens=80, archive=options)
    values = rng.normal(size=(700, 2, head_size)).astype(np.float32)
    for first in range(0, 700, 100):
        q, k = (rng.normal(size=(100, heads, head_size)).astype(np.float32) for heads in (4, 2))
        positions = np.arange(first, first + 100)
        out = cache._native.attend(0, q, k, values[first : first + 100], positions, frequencies, scale=0.2)
        assert np.isfinite(out).all()
        cache.commit(100)
        cache.demote()
    until, usage = cache._native.archived_until, cache.usage()
    step = find_retriever(name).step_tokens
    assert until == (700 - 64) // step * step
    pages = -(-until // 256)
    assert usage.digest_bytes == 2 * pages * 256 * find_retriever(name).digest_bytes_per_token(head_size)
    assert usage.hot_tokens == 700 - until
    for head in range(2):
        restored = cache._native.read_archive(0, head)[1]
        error = (restored - values[:until, head])[16:].std()
        assert error < (0.02 if codec == "q8" else 0.4)
        far = np.roll(restored, 1, axis=0) - values[:until, head]
        assert far[16:].std() > 1
    cache.close()
