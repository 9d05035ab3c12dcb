"""Locks between processes, so that two of them do not fetch, export or save the same thing into the same place.

On POSIX a lock is ``flock``: it goes away with the process that holds it, however that ends. On Windows it
is a locked byte of the lock file, which the system releases in the same way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ...errors import StorageError
from ..reporting import Notice, log_notice

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_BUSY = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}


class LockUnsupportedError(OSError):
    """The file system has no locks (some network folders)."""


def try_lock(descriptor: int) -> bool:
    """Takes the lock of an open file without waiting; False when another open file holds it.

    Raises:
        LockUnsupportedError: the file system has no locks.
    """
    return _try(descriptor, shared=False)


def try_shared_lock(descriptor: int) -> bool:
    """As `try_lock`, for a lock that many may hold at once, as long as nobody has the other kind.

    Windows has no such lock, and needs none against removal: it refuses to remove an open file.
    """
    return True if sys.platform == "win32" else _try(descriptor, shared=True)


def _try(descriptor: int, *, shared: bool) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise LockUnsupportedError(error.errno, error.strerror) from error
    return True


@contextlib.contextmanager
def file_lock(path: Path, what: str, *, notice: Notice = log_notice, poll_seconds: float = 0.2,
              patience_seconds: float | None = None) -> Iterator[None]:
    """Holds the lock file ``path`` while the body runs; waits for another holder and says so once.

    ``what`` is for that notice: "fetching smollm2-135m-instruct". The folder must exist. The file is
    removed at the end, so that an idle cache folder has no lock files.

    Raises:
        StorageError: the other holder was not done after ``patience_seconds`` (None: wait for ever).
    """
    descriptor = _acquire(path, what, notice, poll_seconds, patience_seconds)
    try:
        yield
    finally:
        if sys.platform != "win32":  # Windows refuses to remove an open file; an empty lock file does no harm
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _acquire(path: Path, what: str, notice: Notice, poll_seconds: float, patience_seconds: float | None) -> int:
    told = False
    deadline = None if patience_seconds is None else time.monotonic() + patience_seconds
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            got = try_lock(descriptor)
        except LockUnsupportedError:
            notice(f"the file system of {path.parent} has no locks: let only one process be {what} at once")
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The previous holder may have removed the file between our open and our lock:
        # then it locks nobody out.
        if got and is_linked(descriptor, path):
            return descriptor
        os.close(descriptor)
        if not got:
            if not told:
                notice(f"another process is {what}; waiting for it")
                told = True
            if deadline is not None and time.monotonic() > deadline:
                raise StorageError(f"another process has been {what} for {patience_seconds:.0f} s and holds {path}; "
                                   "wait for it or stop it")
            time.sleep(poll_seconds)


def is_linked(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the file that is open as ``descriptor``."""
    if sys.platform == "win32":
        return True
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
