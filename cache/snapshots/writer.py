"""Writing a snapshot: in one pass, in bounded memory, and under its final name only when all of it is on the disk."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ... import kernels
from ...devices.files.safe_write import temporary_file
from ...errors import SnapshotError
from .layout import (
    ALIGNMENT,
    CODINGS,
    MAX_SECTIONS,
    PLANES,
    RAW,
    LayoutError,
    Preamble,
    Section,
    align,
    is_section_name,
    pack_directory,
)

# Coded only if the first block shrinks to this: what is saved less of is not worth the time to decode, nor the loss of
# being mapped in place.
WORTH_CODING = 0.9

Piece = bytes | bytearray | memoryview | NDArray[Any]  # whatever has a contiguous buffer


class SnapshotWriter:
    """Writes the sections given to `add`, one after the other; the file appears when the ``with`` block ends well.

    Until then it is a temporary file in the same folder, which is removed on every error, and by the next saving if
    the process was killed. ``bytes_needed`` (0: unknown) is checked against the free space first.

    Raises, when entered, in `add` and at the end:
        StorageError: the folder or disk cannot take it. An older file of that name stays as it was.
        SnapshotError: metadata or sections beyond the limits of the format.

    Example:
        with SnapshotWriter(path, {"satchel": "0.1.0"}) as writer:
            writer.add("tokens", [ids])
    """

    def __init__(self, path: Path, metadata: dict[str, Any], *, bytes_needed: int = 0, threads: int = 1) -> None:
        self.path = path
        self._metadata = metadata
        self._threads = threads
        self._sections: dict[str, Section] = {}
        self._end = ALIGNMENT
        self._temporary: AbstractContextManager[BinaryIO] = temporary_file(path, bytes_needed=bytes_needed)
        self._file: BinaryIO | None = None

    def __enter__(self) -> SnapshotWriter:
        self._file = self._temporary.__enter__()
        self._file.write(bytes(ALIGNMENT))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is None:
            try:
                self._finish()
            except BaseException as failure:
                self._temporary.__exit__(type(failure), failure, failure.__traceback__)
                raise
        return self._temporary.__exit__(kind, error, trace)

    def add(self, name: str, pieces: Iterable[Piece], *, coding: str = RAW) -> Section:
        """Writes a section. ``pieces`` are read one at a time; one with ``coding`` other than raw is coded only if
        its first block shrinks by a tenth or more, so what was done is in the result.
        """
        assert self._file is not None, "add() outside of the with block"
        assert is_section_name(name), name
        assert coding in CODINGS, coding
        if name in self._sections or len(self._sections) >= MAX_SECTIONS:
            raise SnapshotError(f"{self.path} cannot get a section {name!r}: it has one, or {MAX_SECTIONS} already")
        self._file.write(bytes(align(self._end) - self._end))
        section = self._write(name, _same_size(pieces, kernels.ENTROPY_BLOCK_BYTES), coding)
        self._sections[name] = section
        self._end = section.end
        return section

    def _write(self, name: str, blocks: Iterator[memoryview], coding: str) -> Section:
        assert self._file is not None
        stored = original = crc = original_crc = 0
        begun = False
        for group in _groups(blocks, 1 if coding == RAW else self._threads):
            whole = b"".join(group) if len(group) > 1 else group[0]
            data: bytes | memoryview = whole
            if coding != RAW:
                data = kernels.entropy_encode(whole, planes=PLANES[coding], threads=self._threads)
                if not begun and not self._is_worth_it(group[0], coding):
                    coding, data = RAW, whole
            begun = True
            self._file.write(data)
            original_crc = zlib.crc32(whole, original_crc)
            crc = original_crc if coding == RAW else zlib.crc32(data, crc)
            stored += len(data)
            original += len(whole)
        return Section(name, coding if begun else RAW, align(self._end), stored, original, crc, original_crc)

    @staticmethod
    def _is_worth_it(block: memoryview, coding: str) -> bool:
        return len(kernels.entropy_encode(block, planes=PLANES[coding])) <= WORTH_CODING * len(block)

    def _finish(self) -> None:
        assert self._file is not None
        try:
            directory, metadata_bytes = pack_directory(self._metadata, list(self._sections.values()))
        except LayoutError as error:
            raise SnapshotError(f"{self.path} cannot be written: {error}") from None
        offset = align(self._end)
        self._file.write(bytes(offset - self._end) + directory)
        preamble = Preamble(
            offset + len(directory), offset, metadata_bytes, len(self._sections), zlib.crc32(directory)
        )
        self._file.seek(0)
        self._file.write(preamble.pack())


def _same_size(pieces: Iterable[Piece], size: int) -> Iterator[memoryview]:
    """The same bytes in pieces of ``size``; only the last one may be shorter."""
    rest = bytearray()
    for piece in pieces:
        view = _bytes(piece)
        first = 0
        if rest:
            first = min(size - len(rest), len(view))
            rest += view[:first]
            if len(rest) < size:
                continue
            yield memoryview(rest)
            rest = bytearray()
        while len(view) - first >= size:
            yield view[first : first + size]
            first += size
        rest += view[first:]
    if rest:
        yield memoryview(rest)


def _bytes(piece: Piece) -> memoryview:
    view = piece.data if isinstance(piece, np.ndarray) else memoryview(piece)
    return view.cast("B") if view.nbytes else memoryview(b"")  # empty ones of several dimensions have no such view


def _groups(blocks: Iterator[memoryview], count: int) -> Iterator[list[memoryview]]:
    group: list[memoryview] = []
    for block in blocks:
        group.append(block)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group
