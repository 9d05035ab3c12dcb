"""``satchel cache``: what is kept, whether it is whole, and away with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from satchel.cache.snapshots import RAW, SnapshotStore, Subject
from satchel.devices.sizes import format_size

MODEL = "0123456789abcdef" * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache folder"


@pytest.fixture
def store(folder: Path) -> SnapshotStore:
    """A store with two snapshots, one of them of two documents."""
    store = SnapshotStore(folder / "snapshots", 10_000_000)
    save(store, 1200, "/docs/manual.pdf", "notes [draft].txt")
    save(store, 40, "/docs/other.md")
    return store


def save(store: SnapshotStore, tokens: int, *documents: str) -> Path:
    subject = Subject(MODEL, "tiny-model", {"sinks": 4}, documents)
    return store.save(subject, range(tokens), [("state", [bytes(20_000)], RAW)])


def find(store: SnapshotStore, tokens: int) -> Any:
    (entry,) = [entry for entry in store.list() if entry.tokens == tokens]
    return entry


def test_list(satchel: Any, store: SnapshotStore, folder: Path) -> None:
    result = satchel("cache", "list", "--cache-dir", folder)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["ID", "SIZE", "TOKENS", "MODEL", "LAST", "USE", "DOCUMENTS"]
    rows = {line.split()[2]: line for line in lines[1:]}
    assert set(rows) == {"1,200", "40"}
    assert "manual.pdf, notes [draft].txt" in rows["1,200"]
    assert "tiny-model" in rows["40"]
    assert find(store, 40).id in rows["40"]


def test_list_json(satchel: Any, store: SnapshotStore, folder: Path) -> None:
    rows = json.loads(satchel("cache", "list", "--json", "--cache-dir", folder).stdout)
    row = next(row for row in rows if row["tokens"] == 1200)
    entry = find(store, 1200)
    assert row["created"].endswith("+00:00")
    assert row["last_used"].endswith("+00:00")
    del row["created"], row["last_used"], row["satchel_version"]
    assert row == {
        "id": entry.id, "path": str(entry.path), "bytes": entry.file_bytes, "tokens": 1200, "model": "tiny-model",
        "model_fingerprint": MODEL, "settings": {"sinks": 4}, "documents": ["/docs/manual.pdf", "notes [draft].txt"],
        "document_count": 2, "problem": None}  # fmt: skip


def test_nothing_there(satchel: Any, folder: Path) -> None:
    result = satchel("cache", "list", "--cache-dir", folder)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no snapshots\n")
    assert json.loads(satchel("cache", "list", "--json", "--cache-dir", folder).stdout) == []
    result = satchel("cache", "verify", "--cache-dir", folder)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no snapshots\n")
    assert satchel("cache", "clear", "--cache-dir", folder).stderr == "removed 0 snapshots\n"
    assert not folder.exists()


def test_verify(satchel: Any, store: SnapshotStore, folder: Path) -> None:
    good, bad = find(store, 40), find(store, 1200)
    result = satchel("cache", "verify", "--cache-dir", folder)
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(result.stdout.splitlines()) == sorted([f"{good.id}  ok", f"{bad.id}  ok"])
    data = bytearray(bad.path.read_bytes())
    data[12_300] ^= 1
    bad.path.write_bytes(data)
    result = satchel("cache", "verify", "--cache-dir", folder)
    assert result.exit_code == 1
    assert f"{bad.id}  the snapshot {bad.path} cannot be used: section 'state' was altered; remove" in result.stdout
    assert f"{good.id}  ok" in result.stdout
    assert result.stderr == "satchel: 1 snapshot cannot be used; remove with 'satchel cache rm ID'\n"
    assert satchel("cache", "verify", "other.md", "--cache-dir", folder).stdout == f"{good.id}  ok\n"


def test_damaged_ones_are_listed_and_can_be_removed(satchel: Any, store: SnapshotStore, folder: Path) -> None:
    bad = find(store, 40)
    bad.path.write_bytes(b"rubbish")
    result = satchel("cache", "list", "--cache-dir", folder)
    assert result.exit_code == 0
    assert "cannot be used" in next(row for row in result.stdout.splitlines() if row.startswith(bad.id))
    rows = json.loads(satchel("cache", "list", "--json", "--cache-dir", folder).stdout)
    assert "it is no snapshot" in next(row for row in rows if row["id"] == bad.id)["problem"]
    assert satchel("cache", "rm", bad.id, "--cache-dir", folder).exit_code == 0
    assert not bad.path.exists()


@pytest.mark.parametrize("name", ["manual.pdf", "/docs/manual.pdf", "notes [draft].txt", "ID"])
def test_rm(satchel: Any, store: SnapshotStore, folder: Path, name: str) -> None:
    entry = find(store, 1200)
    result = satchel("cache", "rm", entry.id[:6] if name == "ID" else name, "--cache-dir", folder)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"removed {entry.id} ({format_size(entry.file_bytes)})\n"
    assert [left.tokens for left in store.list()] == [40]


def test_rm_of_what_is_not_there_removes_nothing(satchel: Any, store: SnapshotStore, folder: Path) -> None:
    result = satchel("cache", "rm", "manual.pdf", "none.pdf", "--cache-dir", folder)
    assert result.exit_code == 1
    assert result.stderr == (
        "satchel: no snapshot has the document, path or id 'none.pdf'; 'satchel cache list' shows them\n"
    )
    assert len(store.list()) == 2
    assert satchel("cache", "rm").exit_code == 2


def test_rm_of_what_is_in_use(satchel: Any, store: SnapshotStore, folder: Path) -> None:
    entry = find(store, 40)
    with store.open(entry.path):
        result = satchel("cache", "rm", entry.id, "--cache-dir", folder)
    assert result.exit_code == 1
    assert "is in use by another process" in result.stderr


@pytest.mark.parametrize(("options", "typed", "left"), [
    (["--yes"], "", 0), ([], "y\n", 0), ([], "n\n", 2), ([], "", 2)])  # fmt: skip
def test_clear(satchel: Any, store: SnapshotStore, folder: Path, options: list[str], typed: str, left: int) -> None:
    result = satchel("cache", "clear", *options, "--cache-dir", folder, input=typed)
    assert result.stdout == ""
    assert len(store.list()) == left
    assert ("Remove 2 snapshots (" in result.stderr) == (not options)
    assert ("removed 2 snapshots\n" in result.stderr) == (left == 0)


def test_clear_leaves_what_is_in_use(satchel: Any, store: SnapshotStore, folder: Path) -> None:
    with store.open(find(store, 40).path):
        result = satchel("cache", "clear", "--yes", "--cache-dir", folder)
    assert result.stderr == "removed 1 snapshot, left 1 in use\n"


@pytest.mark.parametrize("name", ["list", "verify", "rm", "clear"])
def test_help_has_examples(satchel: Any, name: str) -> None:
    result = satchel("cache", name, "--help")
    assert result.exit_code == 0
    assert f"  satchel cache {name}" in result.stdout.partition("Examples:")[2]
    assert "--cache-dir FOLDER" in result.stdout


def test_unknown_and_missing_subcommands(satchel: Any) -> None:
    assert satchel("cache", "lsit").exit_code == 2
    result = satchel("cache")
    assert result.exit_code == 0
    assert "\n  rm " in result.stdout
