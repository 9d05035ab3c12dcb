"""The hub without its sources: the registry, the cache folder, safe writing and locks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from satchel.errors import ModelError, StorageError
from satchel.export.hub import (
    DEFAULT_MODEL,
    all_models,
    cache_folder,
    fetch,
    find,
    safe_write,
)
from satchel.export.hub.cache_folder import exported_packages, package_folder
from satchel.export.hub.file_lock import LockUnsupportedError, file_lock
from satchel.export.hub.registry import REGISTRY_PATH, parse_registry
from satchel.export.hub.safe_write import remove_stale, temporary_file, temporary_folder

# ------------------------------------------------------------------------------------------------ registry


def test_registry_lists_the_three_models_default_first() -> None:
    assert [entry.name for entry in all_models()] == [DEFAULT_MODEL, "smollm2-135m-instruct", "gemma-3-270m"]
    assert find(DEFAULT_MODEL).architecture == "qwen2"
    assert find(DEFAULT_MODEL).context_tokens == 32768
    assert len(find(DEFAULT_MODEL).index) == 6


def test_unknown_name_suggests_and_lists() -> None:
    with pytest.raises(ModelError, match=r"'SmolLM2-135m': did you mean smollm2-135m-instruct\? .*gemma-3"):
        find("SmolLM2-135m")


def test_unsupported_architecture_is_refused_before_any_download(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gemma3, which this version does not run; choose one of qwen2.5"):
        fetch("gemma-3-270m", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"bytes": -1}, "bytes is -1, not a number above 0"),
    ({"bytes": True}, "bytes is True"),
    ({"bytes": 5}, "its members have 491400064 bytes, the model 5"),
    ({"name": "../up"}, "does not match"),
    ({"sha256": "abc"}, "sha256 'abc' does not match"),
    ({"kind": "chatty"}, "kind 'chatty' is none of instruct, base"),
    ({"supported": "yes"}, "supported is 'yes', not true or false"),
    ({"colour": "red"}, "missing or unknown colour"),
    ({"licence": ""}, "licence is '', not a text"),
    ({"hub": []}, "is list, not an object"),
    ({"index": {}}, "index is dict, not a list"),
])
def test_registry_refuses(change: dict[str, object], message: str) -> None:
    raw = json.loads(REGISTRY_PATH.read_text())
    raw["models"][0] |= change
    with pytest.raises(ModelError, match=message):
        parse_registry(json.dumps(raw))


def test_registry_refuses_a_name_twice_and_text_that_is_not_json() -> None:
    raw = json.loads(REGISTRY_PATH.read_text())
    raw["models"].append(raw["models"][1])
    with pytest.raises(ModelError, match="'smollm2-135m-instruct' 2 times"):
        parse_registry(json.dumps(raw))
    with pytest.raises(ModelError, match="not JSON"):
        parse_registry("{")


# -------------------------------------------------------------------------------------------- cache folder


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SATCHEL_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "satchel"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert cache_folder() == tmp_path / ".cache" / "satchel"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "satchel"
    monkeypatch.setenv("SATCHEL_CACHE_DIR", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder(Path("here")) == Path.cwd() / "here"
    assert not list(tmp_path.glob(".cache"))


@pytest.mark.parametrize(("platform", "expected"), [
    ("darwin", "Library/Caches/satchel"), ("win32", "AppData/Local/satchel/Cache")])
def test_cache_folder_of_other_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str,
                                         expected: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SATCHEL_CACHE_DIR", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == tmp_path / expected


def test_exported_packages_are_finished_folders_of_that_model_only(tmp_path: Path) -> None:
    mine = package_folder(tmp_path, "gemma", "0123abcd-8bit")
    for folder in (mine, package_folder(tmp_path, "gemma-large", "0123abcd"), tmp_path / "packages/gemma-x"):
        folder.mkdir(parents=True)
        (folder / "satchel.json").touch()
    package_folder(tmp_path, "gemma", "ffffffff").mkdir()  # no manifest: not finished
    assert exported_packages(tmp_path, "gemma") == [mine]
    assert exported_packages(tmp_path / "none", "gemma") == []


# -------------------------------------------------------------------------------------------- safe writing


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path,
                                                                  error: type[BaseException]) -> None:
    final = tmp_path / "file"
    final.write_bytes(b"old")

    def write_half_a_file() -> None:
        with temporary_file(final) as file:
            file.write(b"half")
            raise error

    def write_half_a_folder() -> None:
        with temporary_folder(tmp_path / "folder") as folder:
            (folder / "part").write_bytes(b"half")
            raise error

    for interrupted in (write_half_a_file, write_half_a_folder):
        with pytest.raises(error):
            interrupted()
    assert final.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_whole_writing_replaces(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        with temporary_file(tmp_path / "new" / "file") as file:
            file.write(text)
        with temporary_folder(tmp_path / "new" / "folder") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / text.decode()).write_bytes(text)
    assert (tmp_path / "new" / "file").read_bytes() == b"two"
    assert sorted(str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*")) == [
        "file", "folder", "folder/sub", "folder/sub/two"]


def test_full_disk_names_folder_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7_000_000))
    with pytest.raises(StorageError, match=r"no space in .*: 8MB needed, 7MB free; .*--cache-dir"), \
            temporary_file(tmp_path / "file", bytes_needed=8_000_000):
        pass
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space in"), temporary_file(tmp_path / "file") as file:
        file.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_error_about_a_file_elsewhere_is_not_blamed_on_the_folder(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), temporary_file(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "no", "/somewhere/else")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    script = ("import os, pathlib, signal, sys\n"
              "from satchel.export.hub.safe_write import temporary_file, temporary_folder\n"
              "out = pathlib.Path(sys.argv[1])\n"
              "with temporary_file(out / 'a') as f, temporary_folder(out / 'b') as d:\n"
              "    (d / 'x').touch()\n"
              "    os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out").iterdir())) == 2
    with temporary_file(tmp_path / "out" / "mine") as file, temporary_folder(tmp_path / "out" / "too"):
        remove_stale(tmp_path / "out")
        assert len(list((tmp_path / "out").iterdir())) == 2
        file.write(b"x")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mine", "too"]


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: int) -> bool:
        raise LockUnsupportedError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(safe_write, "try_lock", unsupported)
    new, old = (tmp_path / f"{safe_write.TEMPORARY_PREFIX}{name}" for name in ("new", "old"))
    new.touch()
    old.touch()
    os.utime(old, (0, 0))
    remove_stale(tmp_path)
    assert new.exists()
    assert not old.exists()


def test_lock_waits_and_says_so(tmp_path: Path) -> None:
    notices: list[str] = []
    order: list[str] = []
    waiting = threading.Event()

    def notice(text: str) -> None:
        notices.append(text)
        waiting.set()

    def second() -> None:
        with file_lock(tmp_path / "lock", "cooking", notice=notice, poll_seconds=0.01):
            order.append("second")

    with file_lock(tmp_path / "lock", "cooking", notice=notice):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert notices == ["another process is cooking; waiting for it"]
    assert not (tmp_path / "lock").exists()
