"""The folder of snapshots: the right one is found, the limit holds, and no kill, second process or damage does harm."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from satchel.cache.snapshots import RAW, SnapshotStore, Subject, settings_key
from satchel.cache.snapshots import store as store_module
from satchel.cache.snapshots.entry import metadata_of
from satchel.errors import OptionError, SnapshotError, StorageError

MODEL = "0123456789abcdef" * 4
SUBJECT = Subject(MODEL, "tiny", {"scorer": "snapkv", "sinks": 4}, ("/docs/manual.pdf", "notes.txt"))
KEY = SUBJECT.settings_key


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, notices: list[str]) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots", 10_000_000, notice=notices.append)


def save(store: SnapshotStore, tokens: object, size: int = 1000, subject: Subject = SUBJECT, used: int = 0) -> Path:
    path = store.save(subject, tokens, [("state", [bytes(size)], RAW)], bytes_needed=size)  # type: ignore[arg-type]
    if used:
        os.utime(path, (used, used))
    return path


def names(store: SnapshotStore) -> list[int]:
    return sorted(entry.tokens for entry in store.list())


# ------------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize(("wanted", "tokens", "common"), [
    (range(100), 100, 100),  # exactly
    (range(150), 100, 100),  # a longer document that begins the same
    (range(70), 100, 70),  # the shortest of those that begin so
    (range(40), 40, 40),
    ([*range(60), *range(1000, 1100)], 60, 60),
    ([*range(55), 7, 7, 7], 60, 55),
    ([*range(100), *range(500, 600)], 100, 100),
    ([5, *range(1, 100)], None, 0),
    ([], None, 0),
])  # fmt: skip
def test_longest_common_prefix(store: SnapshotStore, wanted: list[int], tokens: int | None, common: int) -> None:
    for length in (20, 40, 60, 100, 200):
        save(store, range(length) if length < 200 else [*range(100), *range(2000, 2100)])
    match = store.find(MODEL, KEY, wanted)
    if tokens is None:
        assert match is None
    else:
        assert match is not None
        assert (match.tokens, match.common_tokens, match.is_prefix) == (tokens, common, tokens == common)
        with store.open(match.path) as snapshot:
            assert list(np.frombuffer(snapshot.section("tokens"), "<u4"))[:common] == list(wanted)[:common]


def test_only_whole_prefixes_on_request(store: SnapshotStore) -> None:
    save(store, range(50))
    save(store, range(100))
    match = store.find(MODEL, KEY, range(90), most_unwanted=0)
    assert match is not None
    assert match.tokens == match.common_tokens == 50


def test_large_token_ids_survive(store: SnapshotStore) -> None:
    save(store, [2**32 - 1, 2**31, 0])
    match = store.find(MODEL, KEY, np.array([2**32 - 1, 2**31, 0], np.uint32))
    assert match is not None
    assert match.common_tokens == 3


def test_another_model_or_other_settings_are_not_found(store: SnapshotStore) -> None:
    save(store, range(10))
    other = "f" * 64
    assert store.find(other, KEY, range(10)) is None
    assert store.find(MODEL, settings_key({"sinks": 5}), range(10)) is None
    same_folder = MODEL[:16] + "0" * 48  # folder names hold the first 16 digits only
    assert store.find(same_folder, KEY, range(10)) is None
    assert store.find(MODEL, KEY[:16] + "0" * 48, range(10)) is None


def test_settings_key_is_of_the_values() -> None:
    assert settings_key({"a": 1, "b": [1, None, "x"]}) == settings_key({"b": [1, None, "x"], "a": 1})
    assert len({settings_key(s) for s in ({}, {"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": True}, {"b": 1})}) == 6
    with pytest.raises(ValueError, match="not JSON compliant"):
        settings_key({"a": float("nan")})


# -------------------------------------------------------------------------------------------------------- saving


def test_what_was_said_is_listed(store: SnapshotStore) -> None:
    before = time.time()
    path = store.save(SUBJECT, range(40), [], extra={"chunk": 512})
    (entry,) = store.list()
    assert entry.path == path
    assert (entry.tokens, entry.model_name, entry.model_fingerprint) == (40, "tiny", MODEL)
    assert entry.documents == ("/docs/manual.pdf", "notes.txt")
    assert entry.settings == SUBJECT.settings
    assert entry.settings_key == KEY
    assert entry.extra == {"chunk": 512}
    assert entry.problem == ""
    assert entry.file_bytes == path.stat().st_size
    assert before - 2 < entry.created <= entry.last_used + 1 < time.time() + 3
    assert entry.satchel_version


def test_names_that_a_terminal_should_not_see(store: SnapshotStore) -> None:
    odd = Subject(MODEL, "m\x1b[31m", {}, ("bad\udcff\x07.txt", "x" * 2000, *map(str, range(3000))))
    save(store, range(5), subject=odd)
    (entry,) = store.list()
    assert entry.model_name == "m?[31m"
    assert entry.documents[0] == "bad??.txt"
    assert entry.documents[1] == "x" * 300
    assert (len(entry.documents), entry.document_count) == (1000, 3002)


def test_the_same_again_is_left_alone_but_touched(store: SnapshotStore) -> None:
    path = save(store, range(10), used=1000)
    inode = path.stat().st_ino
    assert save(store, range(10)) == path
    assert path.stat().st_ino == inode
    assert path.stat().st_mtime > 1000


def test_a_damaged_one_is_written_anew(store: SnapshotStore, notices: list[str]) -> None:
    path = save(store, range(10))
    path.write_bytes(path.read_bytes()[:-1])
    assert save(store, range(10)) == path
    with store.open(path) as snapshot:
        snapshot.verify()
    assert len(notices) == 1


def test_least_recently_used_go_first(store: SnapshotStore) -> None:
    for length in range(1, 6):
        save(store, range(length), size=1_990_000, used=100 * length)
    store.touch(store.find(MODEL, KEY, range(1)).path)  # type: ignore[union-attr]
    save(store, range(6), size=3_000_000)
    assert names(store) == [1, 4, 5, 6]
    assert store.used_bytes() <= 10_000_000
    save(store, range(7), size=9_000_000)
    assert names(store) == [7]


def test_what_is_open_stays(store: SnapshotStore) -> None:
    oldest, other = (save(store, range(length), size=4_000_000, used=100 * length) for length in (1, 2))
    with store.open(oldest) as snapshot:
        os.utime(oldest, (1, 1))
        save(store, range(3), size=4_000_000)
        assert names(store) == [1, 3]
        assert not other.exists()
        snapshot.verify()
        with store.open(save(store, range(3))), pytest.raises(StorageError, match="those in use leave no room"):
            save(store, range(4), size=4_000_000)
    assert names(store) == [1, 3]


def test_a_view_protects_as_an_open_snapshot_does(store: SnapshotStore) -> None:
    path = save(store, range(3))
    snapshot = store.open(path)
    view = snapshot.section("state")
    snapshot.close()
    assert store.clear() == (0, 1)
    assert bytes(view) == bytes(1000)
    del view
    assert store.clear() == (1, 0)


def test_larger_than_the_limit_removes_nothing(store: SnapshotStore) -> None:
    save(store, range(1))
    with pytest.raises(StorageError, match=r"a snapshot of 10.1MB is more than .*, 10MB; raise --cache-limit or use"):
        save(store, range(2), size=10_001_000)
    assert names(store) == [1]


def test_the_default_limit_is_a_tenth_of_the_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SnapshotStore(tmp_path / "s")
    monkeypatch.setattr(store_module, "free_bytes", lambda _: 1_000_000)
    assert store.limit_bytes == 100_000
    save(store, range(1))
    assert store.limit_bytes == 100_000 + store.used_bytes() // 10
    monkeypatch.setattr(store_module, "free_bytes", lambda _: 10**13)
    assert store.limit_bytes == 20_000_000_000


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = SnapshotStore(tmp_path / "file")
    assert store.list() == []
    assert store.find(MODEL, KEY, range(3)) is None
    assert store.used_bytes() == 0
    with pytest.raises(StorageError, match="cannot write into"):
        save(store, range(3))


def test_nothing_is_made_by_looking(store: SnapshotStore) -> None:
    assert (store.list(), store.find(MODEL, KEY, [1]), store.clear()) == ([], None, (0, 0))
    assert not store.folder.exists()


# -------------------------------------------------------------------------------------------------------- damage


def test_damaged_files_are_told_of_once_and_removed(store: SnapshotStore, notices: list[str]) -> None:
    good, bad = save(store, range(40)), save(store, range(50))
    bad.write_bytes(b"rubbish")
    match = store.find(MODEL, KEY, range(50))
    assert match is not None
    assert match.path == good
    store.find(MODEL, KEY, range(50))
    assert len(notices) == 1
    assert str(bad) in notices[0]
    assert notices[0].endswith("(removed)")
    assert not bad.exists()


def test_altered_tokens_are_never_matched(store: SnapshotStore, notices: list[str]) -> None:
    path = save(store, range(40))
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)
    assert store.find(MODEL, KEY, range(40)) is None
    assert "'tokens' was altered" in notices[0]


@pytest.mark.parametrize("change", [
    {"tokens": 41}, {"tokens": -1}, {"tokens": "40"}, {"tokens": True}, {"tokens": 10**400}, {"model": []},
    {"documents": [1]}, {"documents": None}, {"created": None}, {"settings": []}, {"head": 1}, {"model": {}}])
def test_odd_metadata(store: SnapshotStore, notices: list[str], change: dict[str, object],
                      monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metadata_of
    monkeypatch.setattr(store_module, "metadata_of", lambda *given: whole(*given) | change)
    path = save(store, range(40))
    monkeypatch.undo()
    listed = store.list()
    assert store.find(MODEL, KEY, range(40)) is None
    assert len(notices) == 1
    assert not path.exists()
    assert bool(listed[0].problem) == (change != {"tokens": 41})


def test_newer_files_are_left_alone(store: SnapshotStore, notices: list[str]) -> None:
    import struct
    import zlib

    path = save(store, range(40))
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, 9)
    struct.pack_into("<I", data, 60, zlib.crc32(data[:60]))
    path.write_bytes(data)
    for _ in range(2):
        assert store.find(MODEL, KEY, range(40)) is None
    assert len(notices) == 1
    assert "update Satchel" in notices[0]
    assert path.exists()
    assert "format version 9" in store.list()[0].problem


# ------------------------------------------------------------------------------------------------------ removing


def test_removing_by_document_id_and_path(store: SnapshotStore) -> None:
    other = Subject(MODEL, "tiny", {}, ("other.md",))
    for length in (1, 2, 3):
        save(store, range(length))
    path = save(store, range(4), subject=other)
    assert [entry.path for entry in store.remove("other.md")] == [path]
    (entry,) = [entry for entry in store.list() if entry.tokens == 1]
    assert store.remove(entry.id[:8]) == [entry]
    (entry,) = [entry for entry in store.list() if entry.tokens == 2]
    assert store.remove(entry.path) == [entry]
    assert [entry.tokens for entry in store.remove("manual.pdf")] == [3]
    for unknown in ("manual.pdf", "zzzz", ""):
        with pytest.raises(OptionError, match=f"no snapshot has the document, path or id '{unknown}'; 'satchel cache"):
            store.remove(unknown)


def test_an_id_that_is_too_short(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("satchel.cache.snapshots.entry.entry_id", lambda path: f"abcd{len(path.name)}{path.name[:3]}")
    for length in (1, 2):
        save(store, range(length))
    with pytest.raises(OptionError, match="'abcd' begins several ids, abcd.*, abcd.*: give more digits"):
        store.remove("abcd")


def test_what_is_in_use_is_not_removed(store: SnapshotStore) -> None:
    path = save(store, range(1))
    save(store, range(2))
    with store.open(path):
        with pytest.raises(StorageError, match="is in use by another process; close that first"):
            store.remove(path)
        assert store.clear() == (1, 1)
    assert store.clear() == (1, 0)
    assert list(store.folder.iterdir()) == []


def test_removed_while_it_is_opened(store: SnapshotStore) -> None:
    path = save(store, range(1))
    path.unlink()
    with pytest.raises(SnapshotError, match="cannot be opened") as caught:
        store.open(path)
    assert not caught.value.damaged


# ----------------------------------------------------------------------------------------------- other processes

SAVER = """
import os, sys
from pathlib import Path
from satchel.cache.snapshots import SnapshotStore, Subject
store = SnapshotStore(Path(sys.argv[1]), 10**9, notice=lambda text: print(text, flush=True))
def pieces():
    print("begun", flush=True)
    if sys.argv[3] == "wait":
        sys.stdin.readline()
    for _ in range(int(sys.argv[2])):
        yield bytes(100_000)
subject = Subject("0123456789abcdef" * 4, "tiny", {"scorer": "snapkv", "sinks": 4}, ("/docs/manual.pdf", "notes.txt"))
store.save(subject, range(300), [("state", pieces(), "raw")])
print("done", flush=True)
"""


def saver(folder: Path, pieces: int, mode: str = "run") -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SAVER, folder, str(pieces), mode], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)  # fmt: skip


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_processes_save_the_same(store: SnapshotStore) -> None:
    first = saver(store.folder, 1, "wait")
    assert line(first) == "begun"
    second = saver(store.folder, 2)
    assert line(second) == "another process is saving a snapshot of the same document; waiting for it"
    first.communicate("\n", timeout=60)
    assert line(second) == "done"  # without having begun
    second.communicate(timeout=60)
    (entry,) = store.list()
    with store.open(entry.path) as snapshot:
        assert snapshot.sections["state"].original_bytes == 100_000
    assert [path.name for path in entry.path.parent.iterdir()] == [entry.path.name]


def test_kill_at_any_moment(store: SnapshotStore, notices: list[str]) -> None:
    older = save(store, range(40))
    rng = random.Random(1)
    for _ in range(10):
        process = saver(store.folder, 200)
        assert line(process) == "begun"
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        match = store.find(MODEL, KEY, range(300))
        assert match is not None
        with store.open(match.path) as snapshot:
            snapshot.verify()
            assert snapshot.sections["state"].original_bytes == (1000 if match.path == older else 20_000_000)
        if match.path != older:
            match.path.unlink()
    assert older.exists()
    assert notices == []
    save(store, range(41))
    assert len(list(older.parent.iterdir())) == 2  # no temporary files, no locks


def test_what_another_process_writes_counts_and_stays(store: SnapshotStore) -> None:
    process = saver(store.folder, 1, "wait")
    assert line(process) == "begun"
    save(store, range(2))
    assert store.clear() == (1, 0)
    process.communicate("\n", timeout=60)
    assert names(store) == [300]


def test_with_file_systems_without_locks(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from satchel.devices.files.file_lock import LockUnsupportedError

    def unsupported(_: int) -> bool:
        raise LockUnsupportedError(1, "no locks")

    for name in ("store.try_lock", "snapshot.try_shared_lock"):
        monkeypatch.setattr(f"satchel.cache.snapshots.{name}", unsupported)
    path = save(store, range(3))
    with store.open(path) as snapshot:
        assert store.clear() == (1, 0)
        snapshot.verify()


def test_files_that_vanish_between_two_looks(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(store, range(3))
    monkeypatch.setattr(store, "_files", lambda **_: [(path, 1, 1.0)])
    path.unlink()
    assert store.list() == []
    assert store.clear() == (1, 0)
