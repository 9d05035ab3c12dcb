"""Where things lie, safe writing and locks."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from satchel.devices.files import safe_write
from satchel.devices.files.cache_folder import cache_folder, exported_packages, package_folder
from satchel.devices.files.file_lock import LockUnsupportedError, file_lock, try_lock, try_shared_lock
from satchel.devices.files.safe_write import remove_stale, temporary_file, temporary_folder
from satchel.errors import StorageError

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
              "from satchel.devices.files.safe_write import temporary_file, temporary_folder\n"
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


def test_lock_gives_up_when_patience_ends(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock", "cooking"):
        waiting = file_lock(tmp_path / "lock", "cooking", poll_seconds=0.01, patience_seconds=0.05)
        with pytest.raises(StorageError, match="another process has been cooking for 0 s and holds .*; wait"), waiting:
            raise AssertionError("two hold the lock")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no shared locks")
def test_many_readers_or_one_owner(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second, third = (os.open(tmp_path / "file", os.O_RDONLY) for _ in range(3))
    assert try_shared_lock(first)
    assert try_shared_lock(second)
    assert not try_lock(third)
    os.close(first)
    assert not try_lock(third)
    os.close(second)
    assert try_lock(third)
    fourth = os.open(tmp_path / "file", os.O_RDONLY)
    assert not try_shared_lock(fourth)
    os.close(fourth)
    os.close(third)
