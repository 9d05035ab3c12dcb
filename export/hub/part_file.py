"""The growing file of a download: hashed as it is written, kept when stopped, gone on with later."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ...devices.files.safe_write import storage_errors
from ...devices.reporting import Progress

CHUNK_BYTES = 1 << 20


class PartFile:
    """A ``.part`` file that is ``done`` bytes long on the way to ``total``, with the SHA-256 of what it has.

    The name of the file must say what is being fetched (see :func:`part_path`): a part of the same name is
    gone on with. Used as a context manager, which closes it and leaves it where it is.
    """

    def __init__(self, path: Path, total: int, progress: Progress, *, keep: int | None = None) -> None:
        """Opens or creates ``path``; of an existing one the first ``keep`` bytes (None = all) are kept.

        Raises:
            StorageError: the folder cannot take it.
        """
        self.path, self.total, self._progress = path, total, progress
        self._file: BinaryIO
        with storage_errors(path.parent, total):
            self._file = path.open("r+b" if path.exists() else "w+b")
            size = os.fstat(self._file.fileno()).st_size
            self._file.truncate(min(size, total, size if keep is None else keep))
            self._rehash()
        self.resumed = self.done > 0

    def _rehash(self) -> None:
        self._sha, self.done = hashlib.sha256(), 0
        size = os.fstat(self._file.fileno()).st_size
        self._file.seek(0)
        while chunk := self._file.read(CHUNK_BYTES):
            self._sha.update(chunk)
            self.done += len(chunk)
            self._progress("checking what is there", self.done, size)

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        return self.total - self.done

    @property
    def sha256(self) -> str:
        """The hexadecimal SHA-256 of the bytes so far."""
        return self._sha.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Appends bytes. Raises: StorageError."""
        with storage_errors(self.path.parent, self.missing):
            self._file.write(chunk)
        self._sha.update(chunk)
        self.done += len(chunk)

    def sync(self) -> None:
        """Puts the bytes on the disk for good. Raises: StorageError."""
        with storage_errors(self.path.parent, self.missing):
            self._file.flush()
            os.fsync(self._file.fileno())

    def restart(self) -> None:
        """Forgets all bytes."""
        self._file.seek(0)
        self._file.truncate()
        self._rehash()

    def discard(self) -> None:
        """Closes and removes the file."""
        self._close_quietly()
        self.path.unlink(missing_ok=True)

    def _close_quietly(self) -> None:
        try:
            self._file.close()
        except OSError:  # a full disk refuses the last buffered bytes, too
            self._file.close()  # the second call finds it closed

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._close_quietly()


def part_path(target: Path, source: str, content: str) -> Path:
    """The part file for ``target`` from ``source`` ("hub"); another promised ``content`` has another name."""
    key = hashlib.sha256(content.encode()).hexdigest()[:12]
    return target.with_name(f"{target.name}.{source}-{key}.part")


def part_files(target: Path, source: str = "") -> list[Path]:
    """The part files that are there for ``target``."""
    prefix = f"{target.name}.{source}"
    if not target.parent.is_dir():
        return []
    return [path for path in target.parent.iterdir()
            if path.name.startswith(prefix) and path.suffix == ".part"]
