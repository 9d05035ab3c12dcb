"""A cache as bytes and back: it goes on bit for bit, and what does not fit is refused, whatever it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.cache import ArchiveOptions
from satchel.cache.codecs import codec_names
from satchel.cache.retrievers import retriever_names

Array = NDArray[Any]
LAYERS, HEADS, KV_HEADS, SIZE = 2, 4, 2, 16
FREQUENCIES = (100.0 ** (-np.arange(6) / 6)).astype(np.float32)  # 12 of 16 dimensions turn
SINKS, WINDOW, CELL = 16, 40, 64
COLD, WARM = 0, 1 << 30
ARCHIVE = ArchiveOptions(codec="q8", retriever="landmark", sinks=SINKS, window=WINDOW, recall_tokens=64, recall_every=3,
                         reach=0, warm_bytes=WARM)  # fmt: skip


@dataclass
class Saved:
    """What a snapshot has: one blob for each layer, and the file that all payloads lie in, one after the other."""

    blobs: list[bytes]
    file: Path
    offsets: list[int]
    tokens: int


def shape(archive: ArchiveOptions | None = None, **options: Any) -> dict[str, Any]:
    native = archive.native(SIZE) if archive else None
    return {"layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "head_size": SIZE, "archive": native, **options}


def read(cache: kernels.KVCache, first: int, tokens: int, seed: int = 0) -> Array:
    """One graph run: the outputs of all layers."""
    rng = np.random.default_rng((seed, first))
    places = np.arange(first, first + tokens)
    outs = []
    for layer in range(LAYERS):
        q, k, v = (rng.normal(size=(tokens, heads, SIZE)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
        outs.append(cache.attend(layer, q, k, v, places, FREQUENCIES, scale=0.5, attention_factor=1.25))
    cache.commit()
    return np.stack(outs)


def archive_all(cache: kernels.KVCache, tokens: int, step: int = CELL) -> None:
    """Archives in two steps, so that there are several extents; some archived tokens stay hot, too."""
    until = (tokens - WINDOW) // CELL * CELL
    for end in (CELL, until) if step == CELL else (until,):
        blocks = (end - cache.archived_until) // 16
        scores = np.random.default_rng(end).normal(size=(LAYERS, KV_HEADS, blocks)).astype(np.float32)
        cache.archive(end, scores)
    hot = np.concatenate([[20, 77], np.arange(until, tokens)]).astype(np.int32)
    for layer in range(LAYERS):
        cache.retain_layer(layer, np.broadcast_to(hot, (KV_HEADS, len(hot))))


def save(cache: kernels.KVCache, tokens: int, file: Path, step: int = 3) -> Saved:
    cells, offsets = cache.archived_until // CELL, []
    with file.open("wb") as out:
        out.write(b"something else")
        for layer in range(LAYERS):
            offsets.append(out.tell())
            written = sum(
                out.write(cache.read_payload(layer, head, first, min(step, cells - first)))
                for head in range(KV_HEADS)
                for first in range(0, cells, step)
            )
            assert written == cache.payload_bytes(layer)
    blobs = [cache.save_layer(layer) for layer in range(LAYERS)]
    assert [len(blob) for blob in blobs] == [cache.layer_bytes(layer) for layer in range(LAYERS)]
    return Saved(blobs, file, offsets, tokens)


@contextmanager
def restored(saved: Saved, options: dict[str, Any]) -> Iterator[kernels.KVCache]:
    with saved.file.open("rb") as file:
        cache = kernels.KVCache.restored(
            **options, tokens=saved.tokens, blobs=iter(saved.blobs), descriptor=file.fileno(),
            payload_offsets=saved.offsets,
        )  # fmt: skip
    yield cache  # the file is closed here: the cache has a descriptor of its own
    cache.close()


def check_equal_future(one: kernels.KVCache, other: kernels.KVCache, first: int) -> None:
    """A chunk, decode steps past the next choices, forgetting in the archive, and another chunk."""
    for tokens in (5, 1, 1, 1, 1, 1, 70, 1):
        expected, found = read(one, first, tokens), read(other, first, tokens)
        np.testing.assert_array_equal(found, expected)
        first += tokens
    for layer in range(LAYERS):
        for mine, theirs in zip(one.observed(layer), other.observed(layer), strict=True):
            np.testing.assert_array_equal(theirs, mine)
    back = first - 100
    for cache in (one, other):
        cache.forget_from(back)
    np.testing.assert_array_equal(read(other, back, 3, seed=1), read(one, back, 3, seed=1))


def check_equal_steps(one: kernels.KVCache, other: kernels.KVCache, first: int) -> None:
    for position in range(first, first + 8):
        np.testing.assert_array_equal(read(other, position, 1), read(one, position, 1))


@pytest.mark.parametrize("observed", [0, 7])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_hot_tier(tokens: int, storage: str, observed: int, tmp_path: Path) -> None:
    options = shape(storage=storage, observed_queries=observed)
    cache = kernels.KVCache(**options)
    read(cache, 0, tokens)
    for layer in range(LAYERS):  # with gaps, as scorers leave them
        cache.retain_layer(layer, np.tile(np.arange(0, tokens, 2 + layer, dtype=np.int32), (KV_HEADS, 1)))
    saved = save(cache, tokens, tmp_path / "file")
    with restored(saved, options) as twin:
        assert twin.pool_bytes == cache.pool_bytes
        assert [twin.save_layer(layer) for layer in range(LAYERS)] == saved.blobs
        check_equal_steps(cache, twin, tokens)


@pytest.mark.parametrize("counts", [(70, 35), (0, 64), (65, 1)])
def test_heads_that_hold_different_numbers(counts: tuple[int, int], tmp_path: Path) -> None:
    options = shape(storage="bf16", observed_queries=4)
    cache = kernels.KVCache(**options)
    read(cache, 0, 150)
    cache.retain_layer(1, [np.arange(5, 5 + count, dtype=np.int32) for count in counts])
    assert [cache.tokens(1, head) for head in range(KV_HEADS)] == list(counts)
    saved = save(cache, 150, tmp_path / "file")
    assert [int.from_bytes(blob[:4], "little") for blob in saved.blobs] == [2, 3]  # as before where nothing differs
    with restored(saved, options) as twin:
        assert [twin.save_layer(layer) for layer in range(LAYERS)] == saved.blobs
        assert twin.pool_bytes == cache.pool_bytes
        check_equal_steps(cache, twin, 150)


def test_heads_of_an_archive_hold_equally_many(tmp_path: Path) -> None:
    cache = kernels.KVCache(**shape(ARCHIVE))
    read(cache, 0, 170)
    cache.retain_layer(0, [np.arange(170, dtype=np.int32), np.arange(1, 170, dtype=np.int32)])
    with pytest.raises(ValueError, match="equally many"):
        cache.save_layer(0)


def test_an_empty_cache(tmp_path: Path) -> None:
    for archive in (None, ARCHIVE):
        cache = kernels.KVCache(**shape(archive))
        with restored(save(cache, 0, tmp_path / "file"), shape(archive)) as twin:
            np.testing.assert_array_equal(read(twin, 0, 70), read(cache, 0, 70))


@pytest.mark.parametrize("place", ["warm", "cold", "half", "cold before"])
@pytest.mark.parametrize("codec", codec_names())
def test_archive(codec: str, place: str, tmp_path: Path) -> None:
    archive = replace(ARCHIVE, codec=codec)
    if place == "cold before":  # what was cold when it was saved, and comes back to memory
        archive = replace(archive, warm_bytes=COLD, cold_folder=str(tmp_path), cold_bytes=WARM)
    options = shape(archive, storage="bf16", observed_queries=8)
    cache = kernels.KVCache(**options)
    read(cache, 0, 300)
    archive_all(cache, 300)
    saved = save(cache, 300, tmp_path / "file")
    payload = cache.payload_bytes(0)
    warm = {"warm": WARM, "cold": COLD, "half": payload, "cold before": WARM}[place]
    again = shape(replace(archive, warm_bytes=warm), storage="bf16", observed_queries=8)
    with restored(saved, again) as twin:
        in_memory = min(warm, 2 * payload)
        usage = twin.archive_usage()
        assert (usage["warm_bytes"], usage["cold_bytes"]) == (in_memory, 2 * payload - in_memory)
        assert twin.archived_until == cache.archived_until == 256
        for mine, theirs in zip(twin.read_archive(1, 1), cache.read_archive(1, 1), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        check_equal_future(cache, twin, 300)


@pytest.mark.parametrize("warm", [COLD, WARM])
@pytest.mark.parametrize("retriever", retriever_names())
def test_retrievers(retriever: str, warm: int, tmp_path: Path) -> None:
    archive = replace(ARCHIVE, retriever=retriever)
    cache = kernels.KVCache(**shape(archive))
    read(cache, 0, 600)
    cache.archive(512)
    cache.drop_archived()
    read(cache, 600, 1)
    saved = save(cache, 601, tmp_path / "file")
    with restored(saved, shape(replace(archive, warm_bytes=warm))) as twin:
        assert [twin.save_layer(layer) for layer in range(LAYERS)] == saved.blobs
        check_equal_future(cache, twin, 601)


@pytest.mark.parametrize("warm", [COLD, WARM])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_saving_between_two_choices_changes_nothing(steps: int, warm: int, tmp_path: Path) -> None:
    cache = kernels.KVCache(**shape(ARCHIVE))
    read(cache, 0, 300)
    archive_all(cache, 300)
    check_equal_steps(cache, cache.fork(), 300)
    for position in range(308, 308 + steps):
        read(cache, position, 1)
    saved = save(cache, 308 + steps, tmp_path / "file")
    with restored(saved, shape(replace(ARCHIVE, warm_bytes=warm))) as twin:
        assert [twin.recalled(1, head) for head in range(2)] == [cache.recalled(1, head) for head in range(2)]
        check_equal_steps(cache, twin, 308 + steps)


@pytest.mark.parametrize("warm", [COLD, WARM])
def test_more_is_archived_and_saved_again(warm: int, tmp_path: Path) -> None:
    """A restored cache grows: its new cells are extents of their own, in memory or in the cold file."""
    growing = replace(ARCHIVE, codec="mikv", warm_bytes=warm, cold_folder=str(tmp_path), cold_bytes=WARM)
    cache = kernels.KVCache(**shape(growing))
    read(cache, 0, 200)
    archive_all(cache, 200)
    saved = save(cache, 200, tmp_path / "file")
    with restored(saved, shape(growing)) as twin:
        for one in (cache, twin):
            read(one, 200, 220)
            one.archive(384)
            one.drop_archived()
        assert twin.archive_usage()["lost_tokens"] == 0
        later = [save(one, 420, tmp_path / name) for one, name in ((cache, "a"), (twin, "b"))]
        assert later[0].blobs == later[1].blobs
        assert later[0].file.read_bytes() == later[1].file.read_bytes()
        with restored(later[1], shape(growing)) as third:
            check_equal_future(third, twin, 420)


def test_forgetting_reads_nothing_into_memory(tmp_path: Path) -> None:
    cold = shape(replace(ARCHIVE, warm_bytes=COLD))
    cache = kernels.KVCache(**shape(ARCHIVE))
    read(cache, 0, 1000)
    archive_all(cache, 1000)
    with restored(save(cache, 1000, tmp_path / "file"), cold) as twin:
        for one in (cache, twin):
            one.forget_from(700)
        usage = twin.archive_usage()
        assert usage["warm_bytes"] == 0
        assert 0 < usage["cold_bytes"] == cache.archive_usage()["warm_bytes"]
        assert save(cache, 700, tmp_path / "a").blobs == save(twin, 700, tmp_path / "b").blobs
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        check_equal_future(cache, twin, 700)


def test_what_was_forgotten_is_not_saved(tmp_path: Path) -> None:
    """Pages keep the bytes of tokens that are gone until others come; a snapshot must not."""
    one, other = (kernels.KVCache(**shape()) for _ in range(2))
    read(one, 0, 50)
    read(one, 50, 14, seed=9)
    one.forget_from(50)
    read(other, 0, 50)
    assert save(one, 50, tmp_path / "a").blobs == save(other, 50, tmp_path / "b").blobs


def test_page_limit(tmp_path: Path) -> None:
    cache = kernels.KVCache(**shape())
    read(cache, 0, 65)
    saved = save(cache, 65, tmp_path / "file")
    with restored(saved, shape(limit_bytes=cache.pool_bytes)) as twin:
        assert twin.pool_bytes == cache.pool_bytes
    too_small = shape(limit_bytes=cache.pool_bytes - 1)
    with pytest.raises(RuntimeError, match="needs more than its limit"), restored(saved, too_small):
        pass


def test_a_run_must_be_committed() -> None:
    cache = kernels.KVCache(**shape())
    read(cache, 0, 3)
    q, k, v = (np.ones((1, heads, SIZE), np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache.attend(1, q, k, v, np.array([3]), FREQUENCIES, scale=1.0)
    cache.save_layer(0)
    with pytest.raises(ValueError, match="commit or roll back"):
        cache.save_layer(1)
    cache.rollback()
    cache.save_layer(1)


def test_lost_pairs_are_not_saved(tmp_path: Path) -> None:
    cache = kernels.KVCache(**shape(replace(ARCHIVE, warm_bytes=COLD)))  # and no file
    read(cache, 0, 300)
    archive_all(cache, 300)
    assert cache.archive_usage()["lost_tokens"]
    for action in (lambda: cache.payload_bytes(0), lambda: cache.read_payload(0, 0, 0, 1)):
        with pytest.raises(RuntimeError, match="has lost pairs"):
            action()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    cache = kernels.KVCache(**shape(ARCHIVE, observed_queries=8))
    read(cache, 0, 300)
    archive_all(cache, 300)
    saved = save(cache, 300, tmp_path / "file")
    good = shape(ARCHIVE, observed_queries=8)
    archives = [replace(ARCHIVE, codec="q4").native(SIZE), replace(ARCHIVE, sinks=32).native(SIZE),
                {**ARCHIVE.native(SIZE), "digest": 0}]  # fmt: skip
    changes: list[dict[str, Any]] = [
        {"heads": 2}, {"kv_heads": 4}, {"head_size": 32}, {"storage": "bf16"}, {"observed_queries": 7}, {"layers": 1},
        {"layers": 3}, {"archive": None}, *({"archive": other} for other in archives),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(ValueError, match="does not fit or is damaged"), restored(saved, {**good, **change}):
            pass
    for wrong in (replace(saved, tokens=299), replace(saved, tokens=301), replace(saved, offsets=[0]),
                  replace(saved, offsets=[0, saved.offsets[1] + 1]), replace(saved, offsets=[0, 2**64 - 1])):
        with pytest.raises(ValueError, match="does not fit or is damaged"), restored(wrong, good):
            pass
    with pytest.raises(ValueError, match="payload"):
        kernels.KVCache.restored(**good, tokens=300, blobs=saved.blobs)


def test_an_error_of_the_reader_comes_through(tmp_path: Path) -> None:
    cache = kernels.KVCache(**shape())
    read(cache, 0, 3)
    blobs = save(cache, 3, tmp_path / "file").blobs

    def cut_off() -> Iterator[bytes]:
        yield blobs[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        kernels.KVCache.restored(**shape(), tokens=3, blobs=cut_off())


HOSTILE = {
    "hot": (None, 70), "ragged": (None, 70), "archive": (ARCHIVE, 170), "mikv": (replace(ARCHIVE, codec="mikv"), 170),
    "kvquant3": (replace(ARCHIVE, codec="kvquant3"), 170), "channels": (replace(ARCHIVE, retriever="channels"), 170),
    "centroid": (replace(ARCHIVE, retriever="centroid"), 300),
}  # fmt: skip


def hostile_case(name: str, folder: Path) -> tuple[Saved, dict[str, Any]]:
    archive, tokens = HOSTILE[name]
    options = shape(archive, observed_queries=4)
    cache = kernels.KVCache(**options)
    read(cache, 0, tokens)
    if name == "ragged":
        for layer in range(LAYERS):
            cache.retain_layer(layer, [np.arange(0, tokens, 1 + head, dtype=np.int32) for head in range(KV_HEADS)])
    if archive:
        archive_all(cache, tokens, archive.step_tokens)
        read(cache, tokens, 1)  # blocks are chosen
        tokens += 1
    return save(cache, tokens, folder / "file"), options


@pytest.mark.parametrize("name", HOSTILE)
def test_every_cut_is_refused(name: str, tmp_path: Path) -> None:
    saved, options = hostile_case(name, tmp_path)
    for layer in range(LAYERS):
        blob = saved.blobs[layer]
        for length in [*range(0, len(blob), 97), len(blob) - 1, len(blob) + 1]:
            cut = (blob + b"\0")[:length]
            blobs = [*saved.blobs[:layer], cut, *saved.blobs[layer + 1 :]]
            with pytest.raises(ValueError, match="damaged"), restored(replace(saved, blobs=blobs), options):
                pass


@pytest.mark.parametrize("name", HOSTILE)
def test_mutations_are_refused_or_harmless(name: str, tmp_path: Path) -> None:
    """Blobs and payload with wrong bytes, mostly in their numbers: ValueError, or a cache that can be used."""
    saved, options = hostile_case(name, tmp_path)
    rng = random.Random(name)
    payload = saved.file.read_bytes()
    used = 0
    for _ in range(800):
        blob = bytearray(saved.blobs[1])
        for _ in range(rng.randint(1, 3)):
            at = rng.choice((rng.randrange(30), rng.randrange(160 // 4), rng.randrange(len(blob) // 4))) * 4
            value = rng.choice((0, 1, 2, 3, 63, 64, 65, 128, 2**31 - 1, 2**31, 2**32 - 1, 0x7FC00000, 0x7F7FFFFF,
                                rng.getrandbits(32), rng.getrandbits(8)))  # fmt: skip
            blob[at : at + 4] = value.to_bytes(4, "little")
        if payload:
            saved.file.write_bytes(bytes(rng.getrandbits(8) if rng.random() < 0.01 else byte for byte in payload)
                                   if rng.random() < 0.05 else payload)  # fmt: skip
        try:
            with restored(replace(saved, blobs=[saved.blobs[0], bytes(blob)]), options) as cache:
                used += 1
                with np.errstate(all="ignore"):
                    for first, tokens in ((0, 1), (1, 1), (2, 20)):
                        read(cache, saved.tokens + first, tokens)
                cache.forget_from(90)
                read(cache, 90, 1)
        except ValueError:
            pass
    assert 50 < used < 790
