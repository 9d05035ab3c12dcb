"""ZIP containers (EPUB, DOCX), read member by member within a bound.

A ZIP bomb unpacks to the bound and is then refused; pictures are never unpacked.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, BinaryIO

from ...errors import DocumentError
from .source import MAX_FILE_BYTES, MIB, Report, Source, too_large

MAX_UNPACKED_BYTES = 128 * MIB  # of the members that hold text, all together; pictures are never unpacked
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OverflowError)


class Archive:
    """An open ZIP file; ``kind`` names the format in messages."""

    def __init__(self, source: Source, kind: str) -> None:
        self._name, self._kind = source.name, kind
        self._left_bytes = MAX_UNPACKED_BYTES
        self._stream: BinaryIO = source.open()
        try:
            if source.size_bytes() > MAX_FILE_BYTES:
                raise too_large(source.name, MAX_FILE_BYTES)
            with self._damage_told():
                self._zip = zipfile.ZipFile(self._stream)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()
        self._stream.close()

    def __contains__(self, member: str) -> bool:
        return member in self._zip.NameToInfo

    def read(self, member: str) -> bytes:
        """All bytes of a member.

        Raises:
            DocumentError: not there, damaged, encrypted, or beyond what may be unpacked in all.
        """
        if member not in self:
            raise self.damaged(f"{member!r} is missing")
        info = self._zip.getinfo(member)
        if info.flag_bits & 1:
            raise DocumentError(
                f"{self._name}: the {self._kind} file is encrypted; save a copy without its password"
            )
        with self._damage_told(), self._zip.open(info) as stream:
            data = stream.read(self._left_bytes + 1)
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise DocumentError(
                f"{self._name}: unpacks to more than {MAX_UNPACKED_BYTES // MIB} MiB of text, which"
                " no real document does; get it from a source you trust"
            )
        return data

    def parse(self, member: str, target: Any, report: Report | None = None) -> None:
        """Feeds an XML member to a parser's ``target``; nothing outside is loaded, no entities are allowed.

        Raises:
            DocumentError: as ``read``, or the XML is damaged.
        """
        from lxml import etree

        data = self.read(member)
        if b"<!ENTITY" in data.replace(b"\0", b""):  # also in UTF-16
            raise self.damaged(f"{member!r} declares XML entities")
        parser = etree.XMLParser(target=target, no_network=True, load_dtd=False, resolve_entities=False)
        step = 1 << 16
        try:
            for start in range(0, len(data), step):
                parser.feed(data[start : start + step])
                if report is not None:
                    report.progress(start / len(data))
            parser.close()
        except etree.XMLSyntaxError as error:
            raise self.damaged(f"{member!r} is not well-formed") from error

    def damaged(self, what: str) -> DocumentError:
        """The error for a container that does not hold what its format promises."""
        return DocumentError(f"{self._name}: not {self._kind}, or damaged ({what}); fetch it again")

    @contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise self.damaged(f"the ZIP container cannot be unpacked: {error}") from error
        except OSError as error:
            raise self.damaged(f"the ZIP container cannot be read: {error}") from error


def holds(source: Source, head: bytes, member: str) -> bool:
    """Whether ``source`` is a ZIP file with this member."""
    if not head.startswith(b"PK"):
        return False
    try:
        with Archive(source, "ZIP") as archive:
            return member in archive
    except DocumentError:
        return False
