"""What every document reader works with: a source of bytes, a report back to the caller, and the limits.

A source on disk is opened when a reader asks for it, and held whole only if the reader wants it whole: the
process lives under a hard memory limit, and a PDF of 300 MB may hold 1 MB of text.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ...errors import DocumentError

MIB = 1 << 20
MAX_TEXT_BYTES = 64 * MIB  # a file that is plain text, and all the text of one call; about 16M tokens
MAX_FILE_BYTES = 1024 * MIB  # a container read piece by piece (PDF, EPUB, DOCX): mostly pictures
HEAD_BYTES = 8192  # what is enough to tell a file's kind


@dataclass(frozen=True)
class Source:
    """One document to read: a file, or bytes that were already read (standard input, a pipe)."""

    name: str
    path: Path | None = None
    data: bytes = b""

    @property
    def extension(self) -> str:
        """Lower case with its dot; empty for standard input."""
        return self.path.suffix.lower() if self.path else ""

    def open(self) -> BinaryIO:
        """A seekable binary stream over the whole source; the caller closes it.

        Raises:
            DocumentError: the file is missing or may not be read.
        """
        if self.path is None:
            return io.BytesIO(self.data)
        try:
            return self.path.open("rb")
        except OSError as error:
            raise unreadable(self.name, error) from error

    def head(self) -> bytes:
        """The first ``HEAD_BYTES`` bytes."""
        with self.open() as stream:
            return stream.read(HEAD_BYTES)

    def size_bytes(self) -> int:
        """Size of the source."""
        with self.open() as stream:
            return stream.seek(0, io.SEEK_END)

    def read_all(self, limit_bytes: int = MAX_TEXT_BYTES) -> bytes:
        """All bytes.

        Raises:
            DocumentError: there are more than ``limit_bytes``, or the file cannot be read.
        """
        if self.path is None and len(self.data) <= limit_bytes:
            return self.data
        with self.open() as stream:
            return read_limited(stream, self.name, limit_bytes)


@dataclass
class Report:
    """What a reader tells while it works: how far it is, and what the reader of the answer should know."""

    name: str
    on_progress: Callable[[str, float], None] | None = None
    notices: list[str] = field(default_factory=list)

    def progress(self, fraction: float) -> None:
        """``fraction`` of this source is read, 0 to 1."""
        if self.on_progress is not None:
            self.on_progress(self.name, fraction)

    def notice(self, text: str) -> None:
        """Something was left out or guessed: one line, without the document's name."""
        self.notices.append(f"{self.name}: {text}")


def read_limited(stream: BinaryIO, name: str, limit_bytes: int) -> bytes:
    """All that is left in ``stream``, never reading more than one byte beyond ``limit_bytes``.

    Raises:
        DocumentError: there is more than the limit, or reading fails.
    """
    try:
        data = stream.read(limit_bytes + 1)
    except OSError as error:
        raise unreadable(name, error) from error
    if len(data) > limit_bytes:
        raise too_large(name, limit_bytes)
    return data


def too_large(name: str, limit_bytes: int) -> DocumentError:
    """The error for a document beyond a limit."""
    limit = f"{limit_bytes // MIB} MiB" if limit_bytes >= MIB else f"{limit_bytes} bytes"
    return DocumentError(f"{name}: larger than the limit of {limit}; split it or give the part you need")


def unreadable(name: str, error: OSError) -> DocumentError:
    """A ``DocumentError`` with the remedy that fits the operating system's error."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return DocumentError(f"{name}: no such file or folder; check the path")
    if isinstance(error, PermissionError):
        return DocumentError(f"{name}: permission denied; allow your user to read it")
    return DocumentError(f"{name}: cannot be read ({error.strerror or error}); copy it to a healthy disk")
