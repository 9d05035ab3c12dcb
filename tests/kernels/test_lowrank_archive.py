"""Archives of low rank: what attention sees of them, the channels that are chosen, and saving them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels

Array = NDArray[Any]
LAYERS, HEADS, KV_HEADS, SIZE = 2, 4, 2, 16
FREQUENCIES = (100.0 ** (-np.arange(6) / 6)).astype(np.float32)  # 12 of 16 dimensions turn
UNLIMITED = 1 << 40


def basis(rank: int, seed: int = 0, layers: int = LAYERS) -> tuple[kernels.LowRankBasis, Array]:
    """As many coefficients on either side, and the matrices [layers, K, 2D, 2D] of x -> x'."""
    rng = np.random.default_rng(seed)
    rows = np.linalg.qr(rng.normal(size=(layers, KV_HEADS, 2 * SIZE, 2 * SIZE)))[0].astype(np.float32)
    keys, values, rest = np.split(rows, [rank, 2 * rank], axis=2)
    found = kernels.LowRankBasis(
        key_encoders=keys.swapaxes(2, 3), key_decoders=keys, value_encoders=values.swapaxes(2, 3),
        value_decoders=values, rest_encoders=rest.swapaxes(2, 3), rest_decoders=rest,
    )  # fmt: skip
    return found, rows[:, :, : 2 * rank].swapaxes(2, 3) @ rows[:, :, : 2 * rank]


def form(bits: int, key_rank: int, value_rank: int) -> tuple[Any, ...]:
    return bits, bits, False, 0, False, key_rank, value_rank


def options(rank: int, bits: int = 16, *, pruned: bool = False, **others: Any) -> dict[str, Any]:
    """Of a cache whose archive has this rank; recall of everything."""
    codec = form(bits, rank, 0 if pruned else rank)
    archive = {
        "high": codec, "low": codec, "digest": 1, "sinks": 16, "recall_tokens": 1 << 20, "recall_every": 3,
        "window": 40, "warm_limit_bytes": UNLIMITED, **({} if pruned else {"basis": basis(rank)[0]}), **others,
    }  # fmt: skip
    return {
        "layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "head_size": SIZE, "observed_queries": 8,
        "archive": archive,
    }  # fmt: skip


def read(cache: kernels.KVCache, first: int, tokens: int) -> Array:
    """One graph run: the outputs of all layers."""
    rng = np.random.default_rng(first)
    outs = []
    for layer in range(LAYERS):
        q, k, v = (rng.normal(size=(tokens, heads, SIZE)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
        k += np.arange(SIZE, dtype=np.float32)  # keys have means, as biases make them
        q *= np.linspace(0.1, 3, SIZE, dtype=np.float32)
        places = np.arange(first, first + tokens)
        outs.append(cache.attend(layer, q, k, v, places, FREQUENCIES, scale=0.25, attention_factor=1.25))
    cache.commit()
    return np.stack(outs)


def filled(settings: dict[str, Any], tokens: int = 300, until: int = 256) -> kernels.KVCache:
    cache = kernels.KVCache(**settings)
    read(cache, 0, tokens)
    cache.archive(until)
    cache.drop_archived()
    return cache


def given(layer: int, head: int) -> tuple[Array, Array]:
    """Keys before RoPE and values of the first 256 tokens, as a cache without archive has them."""
    cache = kernels.KVCache(**{**options(4), "archive": None})
    read(cache, 0, 300)
    keys, values, _ = cache.read(layer, head, rotated=False)
    return keys[:256], values[:256]


@pytest.mark.parametrize("rank", [4, 7, 16])
def test_pairs_are_projected_and_sinks_are_whole(rank: int) -> None:
    cache = filled(options(rank))
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            by = basis(rank)[1][layer, head]
            x, found = (np.hstack(each) for each in (given(layer, head), cache.read_archive(layer, head)))
            np.testing.assert_allclose(found[:16], x[:16], rtol=2.0**-10, atol=1e-5)
            apart = x[16:] - x[16:].mean(axis=0)
            rest = (apart - apart @ by).reshape(-1, 16, 2 * SIZE).mean(axis=1)  # of each block, in 4 bits
            expected = x[16:].mean(axis=0) + apart @ by + np.repeat(rest, 16, axis=0)
            step = np.abs(rest).max() / 7.5 if rank < SIZE else 0
            np.testing.assert_allclose(found[16:], expected, rtol=2.0**-9, atol=8e-3 + 2 * step)
            np.testing.assert_allclose(  # tokens of a block differ by their coefficients alone
                np.diff(found[16:32], axis=0), np.diff(apart[:16] @ by, axis=0), rtol=2.0**-8, atol=2e-2
            )


def test_of_full_rank_it_is_the_archive_without() -> None:
    """And attention over it: 16 of 16 channels in another basis."""
    low, plain = filled(options(16)), filled({**options(16), "archive": {**options(16)["archive"], "basis": None}
                                              | {"high": form(16, 0, 0), "low": form(16, 0, 0)}})  # fmt: skip
    for tokens in (1, 5, 70):
        np.testing.assert_allclose(read(low, 300, tokens), read(plain, 300, tokens), atol=0.02)
        for cache in (low, plain):
            cache.forget_from(300)
    pruned = filled(options(16, pruned=True))
    for tokens in (1, 5, 70):
        np.testing.assert_allclose(read(pruned, 300, tokens), read(plain, 300, tokens), atol=0.02)
        for cache in (pruned, plain):
            cache.forget_from(300)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_bytes_follow_the_rank(bits: int) -> None:
    for rank, pruned in ((4, False), (7, False), (7, True)):
        cache = filled(options(rank, bits, pruned=pruned))
        numbers = rank + (SIZE if pruned else rank)
        rest = 0 if pruned else 2 + (2 * SIZE - 2 * rank) // 2
        block = -(-(numbers * 2 * bits + (64 if bits < 16 else 0) + rest) // 16) * 16
        assert cache.archive_usage()["warm_bytes"] == LAYERS * KV_HEADS * (256 // 16) * block


def test_digests_are_of_whole_keys() -> None:
    """What is chosen does not depend on the rank."""
    some = {"recall_tokens": 48}
    plain = {**options(4), "archive": {**options(4, **some)["archive"], "basis": None}
             | {"high": form(16, 0, 0), "low": form(16, 0, 0)}}  # fmt: skip
    caches = [filled(options(4, **some)), filled(options(4, pruned=True, **some)), filled(plain)]
    for cache in caches:
        read(cache, 300, 1)
    chosen = [[cache.recalled(0, head) for head in range(KV_HEADS)] for cache in caches]
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0][0]) == 3


def test_the_channels_that_queries_look_at_stay() -> None:
    """Keys vary alike in all channels, queries are larger in the last ones; RoPE turns pairs 0-5 with 6-11."""
    cache = filled(options(6, pruned=True))
    for head in range(KV_HEADS):
        keys, _ = given(0, head)
        found = cache.read_archive(0, head)[0]
        kept = np.flatnonzero(found[16:].std(axis=0) > 0.1)
        assert len(kept) == 6
        assert {12, 13, 14, 15} <= set(kept.tolist())
        np.testing.assert_allclose(found[16:, kept], keys[16:, kept], rtol=2.0**-9, atol=0.01)
        lost = np.setdiff1d(np.arange(SIZE), kept)
        np.testing.assert_allclose(found[16:, lost], np.broadcast_to(keys[16:, lost].mean(0), (240, 10)), rtol=1e-4)


def test_without_observed_queries_the_widest_channels_stay() -> None:
    settings = {**options(4, pruned=True), "observed_queries": 0}
    cache = kernels.KVCache(**settings)
    rng = np.random.default_rng(0)
    wide = np.where(np.isin(np.arange(SIZE), (0, 5, 6, 15)), 4, 1).astype(np.float32)
    for layer in range(LAYERS):
        q, k, v = (rng.normal(size=(100, heads, SIZE)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
        cache.attend(layer, q, k * wide, v, np.arange(100), FREQUENCIES, scale=0.25)
    cache.commit()
    cache.archive(64)
    found = cache.read_archive(1, 1)[0]
    assert np.flatnonzero(found[16:].std(axis=0) > 0.01).tolist() == [0, 5, 6, 15]


# --- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"high": form(16, 4, 5), "low": form(16, 5, 5)}, "same ranks"),
        ({"high": form(16, 17, 17), "low": form(16, 17, 17)}, "at most the head size"),
        ({"high": form(16, 5, 4), "low": form(16, 5, 4)}, "other layers, heads or ranks"),
        ({"high": form(16, 0, 0), "low": form(16, 0, 0)}, "other layers, heads or ranks"),
        ({"basis": basis(4, layers=3)[0]}, "other layers, heads or ranks"),
        ({"basis": None}, "only keys can be pruned"),
        ({"high": form(16, 3, 3), "low": form(16, 3, 3)}, "unknown codec"),
        ({"high": (16, 16, False, 0, False, 4)}, "five numbers, or seven"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.KVCache(**{**options(4), "archive": {**options(4)["archive"], **change}})


# --- saved


@contextmanager
def restored(cache: kernels.KVCache, settings: dict[str, Any], tokens: int, file: Path,
             blobs: list[bytes] | None = None) -> Iterator[kernels.KVCache]:  # fmt: skip
    offsets = []
    with file.open("wb") as out:
        for layer in range(LAYERS):
            offsets.append(out.tell())
            for head in range(KV_HEADS):
                out.write(cache.read_payload(layer, head, 0, cache.archived_until // 64))
    with file.open("rb") as saved:
        twin = kernels.KVCache.restored(
            **settings, tokens=tokens, blobs=iter(blobs or saved_layers(cache)), descriptor=saved.fileno(),
            payload_offsets=offsets,
        )  # fmt: skip
    yield twin
    twin.close()


def saved_layers(cache: kernels.KVCache) -> list[bytes]:
    return [cache.save_layer(layer) for layer in range(LAYERS)]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("warm", [0, UNLIMITED])
def test_reopened_it_goes_on_as_before(pruned: bool, bits: int, warm: int, tmp_path: Path) -> None:
    settings = options(7, bits, pruned=pruned, recall_tokens=64)
    cache = filled(settings)
    read(cache, 300, 1)
    cold = {"warm_limit_bytes": warm, "cold_folder": str(tmp_path), "cold_limit_bytes": UNLIMITED}
    again = {**settings, "archive": {**settings["archive"], **cold}}
    with restored(cache, again, 301, tmp_path / "file") as twin:
        assert saved_layers(twin) == saved_layers(cache)
        first = 301
        for tokens in (1, 1, 1, 1, 70, 1):
            np.testing.assert_array_equal(read(twin, first, tokens), read(cache, first, tokens))
            first += tokens
        for one in (cache, twin):
            one.archive(320)  # by the statistics and channels that were saved
            one.drop_archived()
            one.forget_from(310)
        np.testing.assert_array_equal(read(twin, 310, 3), read(cache, 310, 3))


def test_a_blob_of_another_rank_is_refused(tmp_path: Path) -> None:
    plain = {**options(4), "archive": {**options(4)["archive"], "basis": None}
             | {"high": form(16, 0, 0), "low": form(16, 0, 0)}}  # fmt: skip
    forms = {
        "7": options(7), "8": options(8), "pruned": options(7, pruned=True), "plain": plain,
    }  # fmt: skip
    saved = {name: filled(settings) for name, settings in forms.items()}
    for name, cache in saved.items():
        for other, settings in forms.items():
            if other != name:
                message = "other ranks" if "plain" not in (name, other) else "or one of low rank, or the reverse"
                with pytest.raises(ValueError, match=message), restored(cache, settings, 300, tmp_path / "file"):
                    pass


@pytest.mark.parametrize("pruned", [False, True])
def test_hostile_blobs(pruned: bool, tmp_path: Path) -> None:
    """Every cut is refused; wrong numbers are refused, or the cache can be used."""
    settings = options(7, 4, pruned=pruned, recall_tokens=64)
    cache = filled(settings, 170, 128)
    blobs = saved_layers(cache)
    for length in range(0, len(blobs[1]), 61):
        with pytest.raises(ValueError, match="damaged"), restored(
            cache, settings, 170, tmp_path / "file", [blobs[0], blobs[1][:length]]
        ):  # fmt: skip
            pass
    rng, used = np.random.default_rng(pruned), 0
    for turn in range(400):
        blob = bytearray(blobs[1])
        at = 4 * int(rng.integers(0, (40, len(blob) // 4)[turn % 2]))
        values = (0, 1, 2, 7, 16, 17, 1 << 31, (1 << 32) - 1, 0x7FC00000, 0x7F7FFFFF, int(rng.integers(1 << 32)))
        value = int(rng.choice(values))
        blob[at : at + 4] = value.to_bytes(4, "little")
        try:
            with restored(cache, settings, 170, tmp_path / "file", [blobs[0], bytes(blob)]) as twin:
                used += 1
                with np.errstate(all="ignore"):
                    read(twin, 170, 1)
                    read(twin, 171, 20)
                twin.forget_from(90)
                read(twin, 90, 1)
        except ValueError:
            pass
    assert 20 < used < 395


def test_channels_of_a_blob_must_ascend(tmp_path: Path) -> None:
    settings = options(7, pruned=True)
    cache = filled(settings)
    blobs = saved_layers(cache)
    found = cache.read_archive(1, 0)[0]
    kept = np.flatnonzero(found[16:].std(axis=0) > 1e-4).astype("<i4")
    at = blobs[1].index(kept.tobytes())
    for wrong in (kept[::-1], np.where(kept == kept[-1], SIZE, kept), np.where(kept == kept[0], -1, kept)):
        blob = blobs[1][:at] + wrong.astype("<i4").tobytes() + blobs[1][at + wrong.nbytes :]
        with pytest.raises(ValueError, match="channels are out of order or range"), restored(
            cache, settings, 300, tmp_path / "file", [blobs[0], blob]
        ):  # fmt: skip
            pass
