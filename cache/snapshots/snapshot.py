"""An opened snapshot: checked, mapped in place, and protected from removal as long as it is open.

Opening reads the first page and the directory only, whatever the file's size. A file that is replaced or removed by
another process while it is open stays readable here, as its pages live on until the last user is gone; Windows refuses
to remove it instead.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ... import kernels
from ...devices.files.file_lock import LockUnsupportedError, is_linked, try_shared_lock
from ...errors import ClosedError, SnapshotError
from .layout import (
    ALIGNMENT,
    PLANES,
    RAW,
    LayoutError,
    NewerVersionError,
    Preamble,
    Section,
    is_zero,
    parse_directory,
)

_PIECE_BYTES = 1 << 20
_BLOCK_HEADER_BYTES, _LARGEST_OVERHEAD_BYTES = 8, 16  # of a coded block; see the specification
_LOCK_PATIENCE_SECONDS = 2.0  # who has the exclusive lock is about to rename or remove the file


class Snapshot:
    """A snapshot file that is open for reading; close it, or use it as a context manager.

    ``metadata`` is what the writer gave, ``sections`` the table. Views that `section` gave stay valid after `close`.
    """

    def __init__(self, path: Path, descriptor: int, threads: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._threads = threads
        self._map: mmap.mmap | None = None
        self._seeking = threading.Lock()
        self.file_bytes = os.fstat(descriptor).st_size
        preamble = Preamble.parse(self._read(0, ALIGNMENT), self.file_bytes)
        self._directory_offset = preamble.directory_offset
        metadata, sections = parse_directory(
            preamble, self._read(preamble.directory_offset, preamble.directory_bytes)
        )
        self.metadata: dict[str, Any] = metadata
        self.sections: Mapping[str, Section] = MappingProxyType(sections)

    @classmethod
    def open(cls, path: Path, *, threads: int = 1) -> Snapshot:
        """Opens and checks a file; the sections' checksums are checked as they are read. ``threads`` decode.

        Raises:
            SnapshotError: it is missing, damaged, no snapshot, or of a newer version.
        """
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(path, flags)  # without waiting, should it be a pipe
        except OSError as error:
            raise SnapshotError(f"the snapshot {path} cannot be opened ({error.strerror}); check that it is there and "
                                "may be read", damaged=False) from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SnapshotError(f"{path} is not a file; name a snapshot", damaged=False)
            _protect(descriptor, path)
            return cls(path, descriptor, threads)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, NewerVersionError):
                raise SnapshotError(f"the snapshot {path} cannot be used: {error}; update Satchel, or remove the file "
                                    "and the document is read again", damaged=False) from None
            if isinstance(error, LayoutError):
                raise _damaged(path, str(error)) from None
            if isinstance(error, OSError):
                raise _unreadable(path, error) from None
            raise

    def section(self, name: str, *, expected_bytes: int | None = None, verify: bool = True) -> memoryview:
        """The original bytes of a section, read-only: mapped in place when it is raw, decoded when it is coded.

        ``expected_bytes`` is compared before anything is allocated. ``verify=False`` leaves out the checksum.

        Raises:
            SnapshotError: no such section, another length than expected, or a wrong checksum.
        """
        section = self.find(name, expected_bytes)
        if not section.original_bytes:
            return memoryview(b"")
        stored = memoryview(self._mapped())[section.offset : section.end]
        if section.coding == RAW:
            data = stored
        else:
            try:
                array = kernels.entropy_decode(
                    stored, section.original_bytes, planes=PLANES[section.coding], threads=self._threads
                )
            except ValueError as error:
                raise _damaged(self.path, f"section {name!r}: {error}") from None
            data = memoryview(array.data).toreadonly()
        if verify and zlib.crc32(data) != section.original_crc:
            raise _damaged(self.path, f"section {name!r} was altered")
        return data

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The original bytes of a section, a MiB or less at a time, without mapping it: for filling memory that is
        there already. A wrong checksum is known only at the end: do not use what came until it has come well.

        Raises:
            SnapshotError: as `section`.
        """
        section = self.find(name)
        crc = 0
        for piece in self._raw_pieces(section) if section.coding == RAW else self._decoded_pieces(section):
            crc = zlib.crc32(piece, crc)
            yield piece
        if crc != section.original_crc:
            raise _damaged(self.path, f"section {name!r} was altered")

    def offset(self, name: str) -> int:
        """Where a raw section begins in the file: a multiple of 4096. For positioned reads, see `fileno`.

        Raises:
            SnapshotError: no such section, or it is coded.
        """
        section = self.find(name)
        if section.coding != RAW:
            raise _damaged(self.path, f"section {name!r} should not be coded")
        return section.offset

    def fileno(self) -> int:
        """The descriptor, for positioned reads. Raises ClosedError after `close`."""
        if self._descriptor is None:
            raise ClosedError(f"the snapshot {self.path} is closed; open it again")
        return self._descriptor

    def find(self, name: str, expected_bytes: int | None = None) -> Section:
        """The row of a section. Raises SnapshotError when it is missing or its original is of another length."""
        section = self.sections.get(name)
        if section is None:
            raise _damaged(self.path, f"it has no section {name!r}")
        if expected_bytes is not None and section.original_bytes != expected_bytes:
            raise _damaged(self.path, f"section {name!r} has {section.original_bytes} bytes, not {expected_bytes}")
        return section

    def verify(self) -> None:
        """Reads the whole file once, in little memory, and checks every byte of it.

        Raises:
            SnapshotError: something was altered.
        """
        end = ALIGNMENT
        for section in self.sections.values():
            self._verify_zeros(end, section.offset)
            crc = 0
            for piece in self._raw_pieces(section):
                crc = zlib.crc32(piece, crc)
            if crc != section.crc:
                raise _damaged(self.path, f"section {section.name!r} was altered")
            if section.coding != RAW:
                for _ in self.pieces(section.name):
                    pass
            end = section.end
        self._verify_zeros(end, self._directory_offset)

    def close(self) -> None:
        """Ends the protection from removal, at the latest when the last view is gone."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._map = None

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            try:
                self._map = mmap.mmap(self.fileno(), self.file_bytes, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise SnapshotError(f"the snapshot {self.path} cannot be mapped ({error}); read the document anew with "
                                    "--no-cache", damaged=False) from None
        return self._map

    def _raw_pieces(self, section: Section) -> Iterator[memoryview]:
        for at in range(section.offset, section.end, _PIECE_BYTES):
            yield memoryview(self._checked_read(at, min(_PIECE_BYTES, section.end - at)))

    def _decoded_pieces(self, section: Section) -> Iterator[memoryview]:
        at, left = section.offset, section.original_bytes
        while left:
            header = self._checked_read(at, min(_BLOCK_HEADER_BYTES, section.end - at))
            length = min(left, kernels.ENTROPY_BLOCK_BYTES)
            stored = int.from_bytes(header[4:], "little")
            if stored > min(length + _LARGEST_OVERHEAD_BYTES, section.end - at - _BLOCK_HEADER_BYTES):
                raise _damaged(self.path, f"section {section.name!r} has a block of impossible length")
            block = self._checked_read(at, _BLOCK_HEADER_BYTES + stored)
            try:
                yield memoryview(kernels.entropy_decode(block, length, planes=PLANES[section.coding]).data)
            except ValueError as error:
                raise _damaged(self.path, f"section {section.name!r}: {error}") from None
            at += len(block)
            left -= length
        if at != section.end:
            raise _damaged(self.path, f"section {section.name!r} has bytes left over")

    def _verify_zeros(self, begin: int, end: int) -> None:
        if not is_zero(self._checked_read(begin, end - begin)):
            raise _damaged(self.path, f"the bytes from {begin} on should be zero")

    def _checked_read(self, offset: int, length: int) -> bytes:
        try:
            data = self._read(offset, length)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if len(data) != length:
            raise _damaged(self.path, "it was cut short while it was open")
        return data

    def _read(self, offset: int, length: int) -> bytes:
        if sys.platform == "win32":
            with self._seeking:
                os.lseek(self.fileno(), offset, os.SEEK_SET)
                return os.read(self.fileno(), length)
        data = os.pread(self.fileno(), length, offset)
        while len(data) < length:  # a read may be cut short by a signal
            more = os.pread(self.fileno(), length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


def _protect(descriptor: int, path: Path) -> None:
    """Takes the shared lock. Raises SnapshotError when the file was removed or replaced meanwhile."""
    deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
    try:
        while not try_shared_lock(descriptor):
            if time.monotonic() > deadline:
                raise SnapshotError(f"the snapshot {path} is being written or removed by another process; try again",
                                    damaged=False)
            time.sleep(0.01)
    except LockUnsupportedError:  # then nothing protects it but the system: an open file stays readable
        return
    if not is_linked(descriptor, path):
        raise SnapshotError(f"the snapshot {path} was just removed; the document is read again", damaged=False)


def _damaged(path: Path, what: str) -> SnapshotError:
    return SnapshotError(f"the snapshot {path} cannot be used: {what}; remove the file, and the document is read again")


def _unreadable(path: Path, error: OSError) -> SnapshotError:
    return SnapshotError(f"the snapshot {path} cannot be read ({error.strerror}); check the disk, or remove the file "
                         "and the document is read again", damaged=False)
