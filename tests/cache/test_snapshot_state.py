"""A conversation's cache in a snapshot: saved, found, restored, and as if nothing had happened."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel.cache import ArchiveOptions, CacheFullError, CacheSettings, CacheShape, KVCache
from satchel.cache.snapshots import RAW, Snapshot, SnapshotStore, SnapshotWriter, Subject
from satchel.errors import SnapshotError, StorageError

Array = NDArray[Any]
FREQUENCIES = (100.0 ** (-np.arange(8) / 8)).astype(np.float32)
SHAPE = CacheShape(layers=2, heads=4, kv_heads=2, head_size=16, scale=0.25)
SETTINGS = CacheSettings(sinks=16, window=40, scorer="snapkv")
SUBJECT = Subject("0123456789abcdef" * 4, "a model", {"any": "settings"}, ("document.txt",))
ARCHIVE = ArchiveOptions(codec="mikv", retriever="landmark", sinks=16, window=40, recall_tokens=64, recall_every=4,
                         reach=0, warm_bytes=1 << 30, cold_folder=tempfile.gettempdir(),
                         cold_bytes=1 << 30)  # fmt: skip
KINDS = {  # hot_tokens, archive when it is saved, archive when it is restored
    "full": (None, None, None),
    "forgetting": (100, None, None),
    "warm": (60, ARCHIVE, ARCHIVE),
    "cold": (60, ARCHIVE, replace(ARCHIVE, warm_bytes=0)),
    "beyond reach": (60, replace(ARCHIVE, reach=200), replace(ARCHIVE, reach=200, warm_bytes=0)),
}
SCORED = {  # these keep scores, or different numbers of tokens
    "h2o": replace(SETTINGS, scorer="h2o"),
    "keyformer, warm": replace(SETTINGS, scorer="keyformer"),
    "adaptive": replace(SETTINGS, head_budgets="adaptive"),
    "h2o, adaptive": replace(SETTINGS, scorer="h2o", head_budgets="adaptive"),
}
KINDS |= {kind: (75, ARCHIVE, ARCHIVE) if "warm" in kind else (200, None, None) for kind in SCORED}
TOKENS = list(range(1000, 1330))


def make(kind: str) -> KVCache:
    hot_tokens, archive, _ = KINDS[kind]
    return KVCache(SHAPE, SCORED.get(kind, SETTINGS), hot_tokens=hot_tokens, archive=archive)


def read(cache: KVCache, tokens: int) -> Array:
    """Reads and demotes, as a chunk of a document: [layers, tokens, H, D]."""
    rng = np.random.default_rng(cache.total_tokens)
    places = np.arange(cache.total_tokens, cache.total_tokens + tokens)
    outs = []
    for layer in range(SHAPE.layers):
        q, k, v = (rng.normal(size=(tokens, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
        if cache.settings.head_budgets == "adaptive":
            k *= np.array([0.01, 9], np.float32)[:, None]  # one head looks everywhere, one at some pairs
        outs.append(cache._native.attend(layer, q, k, v, places, FREQUENCIES, scale=SHAPE.scale))
    cache.commit(tokens)
    cache.demote()
    return np.stack(outs)


def read_document(cache: KVCache) -> None:
    for _ in range(len(TOKENS) // 110):
        read(cache, 110)


def save(cache: KVCache, folder: Path) -> SnapshotStore:
    store = SnapshotStore(folder, 10**9)
    extra = {**cache.snapshot_extra(), "of the runtime": 1}
    store.save(SUBJECT, TOKENS, cache.sections(), bytes_needed=cache.snapshot_bytes(), extra=extra)
    return store


def restore(kind: str, snapshot: Snapshot, **options: Any) -> KVCache:
    hot_tokens, _, archive = KINDS[kind]
    settings = SCORED.get(kind, SETTINGS)
    return KVCache.restored(SHAPE, settings, snapshot, **{"hot_tokens": hot_tokens, "archive": archive, **options})


@contextmanager
def found(store: SnapshotStore, tokens: list[int]) -> Iterator[tuple[Snapshot, int]]:
    match = store.find(SUBJECT.model_fingerprint, SUBJECT.settings_key, tokens)
    assert match is not None
    with store.open(match.path) as snapshot:
        yield snapshot, match.common_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_saved_found_restored_and_continued(kind: str, tmp_path: Path) -> None:
    cache = make(kind)
    read_document(cache)
    with found(save(cache, tmp_path), TOKENS) as (snapshot, common):
        assert common == len(TOKENS)
        stored = sum(section.stored_bytes for name, section in snapshot.sections.items() if name != "tokens")
        assert stored == cache.snapshot_bytes()
        twin = restore(kind, snapshot)
    assert twin.total_tokens == cache.total_tokens == len(TOKENS)
    before, after = cache.usage(), twin.usage()
    assert (after.hot_bytes, after.hot_tokens) == (before.hot_bytes, before.hot_tokens)
    assert after.digest_bytes == before.digest_bytes
    if kind == "cold":
        assert (after.warm_bytes, after.cold_bytes) == (0, before.warm_bytes)
    if "adaptive" in kind:
        assert len({cache._native.tokens(0, head) for head in range(2)}) == 2
    for tokens in (7, 1, 1, 1, 1, 1, 1, 120, 1):
        np.testing.assert_array_equal(read(twin, tokens), read(cache, tokens))
    for layer, head in ((0, 0), (1, 1)):
        np.testing.assert_array_equal(twin._native.positions(layer, head), cache._native.positions(layer, head))
    assert twin.usage().hot_bytes == cache.usage().hot_bytes
    twin.close()


@pytest.mark.parametrize("kind", ["h2o", "keyformer, warm", "h2o, adaptive"])
def test_scores_go_with_their_pairs(kind: str, tmp_path: Path) -> None:
    cache = make(kind)
    read_document(cache)
    with found(save(cache, tmp_path), TOKENS) as (snapshot, _):
        twin = restore(kind, snapshot)
        name = f"scores-{kind.split(',')[0]}-000"
        bare = rewritten(snapshot, tmp_path / "bare", extra=cache.snapshot_extra(), **{name.replace("-", "_"): None})
        with Snapshot.open(bare) as without:
            other = restore(kind, without)
    rows = [one._ranking.view(one._native, 0, 0) for one in (cache, twin, other)]
    assert (rows[0].kept > 0).all()
    assert rows[0].scored_until == len(TOKENS)
    np.testing.assert_array_equal(rows[1].kept, rows[0].kept)
    assert (rows[1].scored_until, rows[2].scored_until) == (len(TOKENS), 0)
    assert not rows[2].kept.any()


def test_wrong_scores_are_refused(tmp_path: Path) -> None:
    cache = make("h2o")
    read_document(cache)
    with found(save(cache, tmp_path), TOKENS) as (snapshot, _):
        good = bytes(snapshot.section("scores-h2o-001"))
        half = 8 + 8 * int.from_bytes(good[:4], "little")
        nan, late = np.array([np.nan], "<f4").tobytes(), np.array([len(TOKENS)], "<i4").tobytes()
        attacks = [
            b"", good[:-1], good + b"\0", good[:half], b"\xff\xff\xff\xff" + good[4:],
            good[:4] + np.array([331], "<u4").tobytes() + good[8:],  # more queries than there were
            good[:8] + good[16:24] + good[8:16] + good[24:],  # positions that do not ascend
            good[:12] + nan + good[16:], good[: half - 8] + late + good[half - 4 :],
            good[:8] + b"\xff\xff\xff\xff" + good[12:],
        ]  # fmt: skip
        for attack in attacks:
            path = rewritten(snapshot, tmp_path / "attack", extra=cache.snapshot_extra(), scores_h2o_001=attack)
            with Snapshot.open(path) as wrong, pytest.raises(SnapshotError, match="scores of its layer 1"):
                restore("h2o", wrong)


@pytest.mark.parametrize("common", [1, 17, 200, 329])
@pytest.mark.parametrize("kind", [kind for kind, (_, archive, _) in KINDS.items() if archive or kind == "full"])
def test_only_a_prefix_is_wanted(kind: str, common: int, tmp_path: Path) -> None:
    """Forgetting after the restoring is as forgetting without it."""
    cache = make(kind)
    read_document(cache)
    with found(save(cache, tmp_path), [*TOKENS[:common], 1, 2, 3]) as (snapshot, match):
        assert match == common
        twin = restore(kind, snapshot)
    for one in (cache, twin):
        one.forget_from(common)
        assert one.total_tokens == common
    for tokens in (5, 1, 1, 100, 1):
        np.testing.assert_array_equal(read(twin, tokens), read(cache, tokens))


def test_cold_pairs_outlive_the_file_and_keep_it_locked(tmp_path: Path) -> None:
    cache = make("cold")
    read_document(cache)
    store = save(cache, tmp_path)
    with found(store, TOKENS) as (snapshot, _):
        twin = restore("cold", snapshot)
        path = snapshot.path
    with pytest.raises(StorageError, match="in use"):
        store.remove(path)
    path.unlink()
    np.testing.assert_array_equal(read(twin, 9), read(cache, 9))
    assert twin.usage().flash_bytes_read > 0


def test_saved_again_after_it_was_restored(tmp_path: Path) -> None:
    cache = make("warm")
    read_document(cache)
    with found(save(cache, tmp_path / "first"), TOKENS) as (snapshot, _):
        twin = restore("cold", snapshot)
        with found(save(twin, tmp_path / "second"), TOKENS) as (again, _):
            for name in snapshot.sections:
                assert again.section(name) == snapshot.section(name)


def test_no_room(tmp_path: Path) -> None:
    cache = make("full")
    read_document(cache)
    with found(save(cache, tmp_path), TOKENS) as (snapshot, _), pytest.raises(CacheFullError, match="limit of 1000"):
        restore("full", snapshot, limit_bytes=1000)


def test_lost_pairs_are_not_saved() -> None:
    cache = KVCache(SHAPE, SETTINGS, hot_tokens=60, archive=replace(ARCHIVE, warm_bytes=0, cold_folder=""))
    read_document(cache)
    for action in (cache.sections, cache.snapshot_bytes):
        with pytest.raises(StorageError, match=r"lost pairs.*read the document again"):
            action()


def rewritten(snapshot: Snapshot, path: Path, *, extra: object, **changes: bytes | None) -> Path:
    """The snapshot with some sections changed or left out (None), and right checksums: an attack."""
    with SnapshotWriter(path, {**snapshot.metadata, "extra": extra}) as writer:
        for name in snapshot.sections:
            data = changes.get(name.replace("-", "_"), bytes(snapshot.section(name)))
            if data is not None:
                writer.add(name, [data], coding=RAW)
    return path


def test_wrong_contents_are_refused(tmp_path: Path) -> None:
    cache = make("cold")
    read_document(cache)
    good = cache.snapshot_extra()
    blob, payload = cache._native.save_layer(1), cache._native.payload_bytes(1)
    with found(save(cache, tmp_path), TOKENS) as (snapshot, _):
        assert restore("cold", snapshot).total_tokens == 330
        attacks: list[tuple[object, dict[str, bytes | None]]] = [
            ({}, {}), (None, {}), ({"total_tokens": True}, {}), ({"total_tokens": "330"}, {}),
            ({"total_tokens": 0}, {}), ({"total_tokens": 331}, {}), ({"total_tokens": 329}, {}),
            (good, {"layer_001": blob[:-1]}), (good, {"layer_001": b""}), (good, {"layer_001": None}),
            (good, {"payload_001": None}), (good, {"payload_000": None, "payload_001": None}),
            (good, {"payload_001": b""}), (good, {"payload_000": bytes(payload - 1)}),
            (good, {"payload_001": bytes(payload + 1)}),
        ]  # fmt: skip
        for extra, changes in attacks:
            path = rewritten(snapshot, tmp_path / "attack", extra=extra, **changes)
            with Snapshot.open(path) as attack, pytest.raises(SnapshotError, match="cannot be used"):
                restore("cold", attack)
        for kind in ("full", "beyond reach"):  # another way to keep pairs; and the same, read farther than before
            with Snapshot.open(snapshot.path) as whole:
                if kind == "full":
                    with pytest.raises(SnapshotError, match="archive where none is set"):
                        restore(kind, whole)
                else:
                    restore(kind, whole).close()


@pytest.mark.parametrize("section", ["layer-001", "payload-000"])
def test_altered_bytes_are_found_before_they_are_used(section: str, tmp_path: Path) -> None:
    cache = make("cold")
    read_document(cache)
    with found(save(cache, tmp_path), TOKENS) as (snapshot, _):
        path, offset, size = snapshot.path, snapshot.offset(section), snapshot.find(section).stored_bytes
    data = bytearray(path.read_bytes())
    data[offset + size - 5] ^= 1
    path.write_bytes(data)
    with Snapshot.open(path) as snapshot, pytest.raises(SnapshotError, match=f"{section}' was altered"):
        restore("cold", snapshot)
