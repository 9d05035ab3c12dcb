"""Write, then rename: what has a final name in the cache folder is whole, whatever interrupted the writing.

A temporary file or folder lies beside its final place under a unique name, and its writer holds a lock on it.
So what a killed process left behind is recognised (nobody holds its lock) and removed by the next one that
comes by.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...errors import StorageError
from ..sizes import format_size
from .cache_folder import ENVIRONMENT_VARIABLE
from .file_lock import LockUnsupportedError, is_linked, try_lock

TEMPORARY_PREFIX = ".satchel-tmp-"
STALE_SECONDS_WITHOUT_LOCKS = 24 * 3600.0
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EIO,
            errno.ENAMETOOLONG, errno.ELOOP}
_REMEDY = f"choose another folder by --cache-dir or {ENVIRONMENT_VARIABLE}"


def no_space_error(folder: Path, bytes_needed: int) -> StorageError:
    """The error for a full disk: names the folder, what is needed and what is free."""
    needed = f"{format_size(bytes_needed)} needed, " if bytes_needed else ""
    return StorageError(f"no space in {folder}: {needed}{format_size(free_bytes(folder))} free; "
                        f"make room or {_REMEDY}")


@contextlib.contextmanager
def storage_errors(folder: Path, bytes_needed: int = 0) -> Iterator[None]:
    """Turns the system's refusals to write into ``folder`` into :class:`StorageError`; other errors pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str) and not Path(error.filename).is_relative_to(folder) \
                and not folder.is_relative_to(error.filename):
            raise  # about a file elsewhere
        if error.errno in _NO_SPACE:
            raise no_space_error(folder, bytes_needed) from error
        if error.errno in _REFUSED:
            raise StorageError(f"cannot write into {folder}: {os.strerror(error.errno or 0).lower()}; "
                               f"make it writable or {_REMEDY}") from error
        raise


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of ``folder``, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def require_space(folder: Path, bytes_needed: int) -> None:
    """Says no before anything is written.

    Raises:
        StorageError: the disk has less than ``bytes_needed`` free.
    """
    if free_bytes(folder) < bytes_needed:
        raise no_space_error(folder, bytes_needed)


def make_folder(folder: Path) -> Path:
    """Creates ``folder`` and its parents where missing, and returns it.

    Raises:
        StorageError: the system refuses.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def temporary_file(final: Path, *, bytes_needed: int = 0) -> Iterator[BinaryIO]:
    """A new binary file that becomes ``final`` when the body ends well, and nothing when it does not.

    Raises:
        StorageError: the folder cannot take it; ``bytes_needed`` (0 = unknown) is checked first.
    """
    folder = make_folder(final.parent)
    require_space(folder, bytes_needed)
    with storage_errors(folder, bytes_needed):
        path, descriptor = _new_file(final)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if sys.platform != "win32":
                    path.replace(final)  # while the lock is held
            if sys.platform == "win32":
                path.replace(final)
            _sync_folder(folder)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def temporary_folder(final: Path, *, bytes_needed: int = 0) -> Iterator[Path]:
    """A new folder that becomes ``final`` (replacing one of that name) when the body ends well.

    Raises:
        StorageError: the parent folder cannot take it; ``bytes_needed`` (0 = unknown) is checked first.
    """
    with scratch_folder(final.parent, final.name, bytes_needed=bytes_needed) as path:
        yield path
        for file in path.rglob("*"):
            if file.is_file():
                with file.open("rb+" if sys.platform == "win32" else "rb") as handle:
                    os.fsync(handle.fileno())
        if final.exists():
            final.replace(final.with_name(f"{TEMPORARY_PREFIX}old-{uuid.uuid4().hex[:12]}"))
        path.replace(final)
        _sync_folder(final.parent)
    remove_stale(final.parent)


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str = "scratch", *, bytes_needed: int = 0) -> Iterator[Path]:
    """A new folder inside ``parent`` that is removed with all it has at the end.

    Raises:
        StorageError: ``parent`` cannot take it.
    """
    make_folder(parent)
    require_space(parent, bytes_needed)
    with storage_errors(parent, bytes_needed):
        while True:
            path = _unique(parent / name)
            path.mkdir()
            descriptor = None if sys.platform == "win32" else os.open(path, os.O_RDONLY)
            if descriptor is None or _claim(descriptor, path):
                break
            os.close(descriptor)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Removes the temporary files and folders in ``folder`` that no living process writes."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    if sys.platform == "win32":
        stale, descriptor = _is_old(path), None
    else:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            stale = try_lock(descriptor)
        except LockUnsupportedError:
            stale = _is_old(path)
    try:
        if stale and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif stale:
            path.unlink()
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > STALE_SECONDS_WITHOUT_LOCKS


def _unique(final: Path) -> Path:
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{uuid.uuid4().hex[:12]}")


def _claim(descriptor: int, path: Path) -> bool:
    """Locks a fresh temporary; False when a cleaner took it for stale in the instant before."""
    try:
        return try_lock(descriptor) and is_linked(descriptor, path)
    except LockUnsupportedError:
        return True


def _new_file(final: Path) -> tuple[Path, int]:
    binary = getattr(os, "O_BINARY", 0)
    while True:
        path = _unique(final)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | binary, 0o666)
        if sys.platform == "win32" or _claim(descriptor, path):
            return path, descriptor
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; not every file system can, and Windows needs nothing."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
