"""The bytes of a snapshot file: preamble and directory, packed and parsed. ``docs/snapshot-format.md`` is the
specification.

Everything that a file says is checked here, before anybody allocates or maps by it. There is exactly one valid layout
for given sections (each begins at the next multiple of 4096, in the order of the table), so a file has no room for
overlaps, gaps with hidden data or offsets past the end.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ... import kernels

MAGIC = b"\x89SATCHEL"
VERSION = 1
ALIGNMENT = 4096  # bytes; a memory page, and a sector of every flash device or a multiple of it
MAX_METADATA_BYTES = 1 << 20
MAX_SECTIONS = 4096
MAX_FILE_BYTES = 1 << 62
RAW, RANS_8, RANS_BF16 = "raw", "rans-8", "rans-bf16"
CODINGS = (RAW, RANS_8, RANS_BF16)  # a coding's number in the file is its place here
PLANES = {RANS_8: 1, RANS_BF16: 2}

_PREAMBLE = struct.Struct("<8sIIQQIIII12xI")
_ENTRY = struct.Struct("<40sIIQQQII")
PREAMBLE_BYTES = _PREAMBLE.size
ENTRY_BYTES = _ENTRY.size
_NAME = re.compile(rb"[a-z0-9._/-]{1,40}")


class LayoutError(ValueError):
    """What is wrong with the bytes, in a few words; the reader adds the file and what to do."""


class NewerVersionError(LayoutError):
    """Nothing is wrong with them, but this version cannot read them."""


@dataclass(frozen=True)
class Section:
    """One row of the table. ``crc`` is of the stored bytes, ``original_crc`` of what they decode to (CRC-32)."""

    name: str
    coding: str
    offset: int
    stored_bytes: int
    original_bytes: int
    crc: int
    original_crc: int

    @property
    def end(self) -> int:
        return self.offset + self.stored_bytes


@dataclass(frozen=True)
class Preamble:
    """Where the directory lies."""

    file_bytes: int
    directory_offset: int
    metadata_bytes: int
    section_count: int
    directory_crc: int

    @property
    def directory_bytes(self) -> int:
        return self.metadata_bytes + ENTRY_BYTES * self.section_count

    def pack(self) -> bytes:
        """The first ``ALIGNMENT`` bytes of the file."""
        start = _PREAMBLE.pack(
            MAGIC, VERSION, 0, self.file_bytes, self.directory_offset, self.metadata_bytes, self.section_count,
            self.directory_crc, 0, 0,
        )[:-4]  # fmt: skip
        return (start + struct.pack("<I", zlib.crc32(start))).ljust(ALIGNMENT, b"\0")

    @classmethod
    def parse(cls, block: bytes, file_bytes: int) -> Preamble:
        """Reads the first ``ALIGNMENT`` bytes of a file of ``file_bytes``. Raises LayoutError."""
        if block[:8] != MAGIC:
            raise LayoutError("it is no snapshot")
        if len(block) < ALIGNMENT:
            raise LayoutError("it is cut short")
        _, version, flags, length, offset, metadata, sections, crc, spare, own_crc = _PREAMBLE.unpack_from(block)
        if version > VERSION and own_crc == zlib.crc32(block[: PREAMBLE_BYTES - 4]):
            raise NewerVersionError(f"it has format version {version}, this Satchel reads {VERSION}")
        if own_crc != zlib.crc32(block[: PREAMBLE_BYTES - 4]) or not is_zero(block[PREAMBLE_BYTES:]):
            raise LayoutError("its first bytes were altered")
        if version != VERSION or flags or spare or not is_zero(block[48 : PREAMBLE_BYTES - 4]):
            raise LayoutError(f"it has format version {version} with flags {flags:#x}")
        if length != file_bytes:
            raise LayoutError(f"it has {file_bytes} bytes and should have {length}")
        found = cls(length, offset, metadata, sections, crc)
        if metadata > MAX_METADATA_BYTES or sections > MAX_SECTIONS:
            raise LayoutError(f"its directory claims {metadata} bytes of metadata and {sections} sections")
        if offset % ALIGNMENT or offset < ALIGNMENT or offset + found.directory_bytes != length:
            raise LayoutError("its directory is not at its end")
        return found


def align(offset: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def is_zero(data: bytes) -> bool:
    """Whether all bytes are zero: a comparison, which takes a fraction of what a loop over them does."""
    return data == bytes(len(data))


def pack_directory(metadata: dict[str, Any], sections: Sequence[Section]) -> tuple[bytes, int]:
    """(directory, bytes of its metadata). Raises LayoutError when it is beyond the limits."""
    text = json.dumps(metadata, separators=(",", ":")).encode("ascii")
    if len(text) > MAX_METADATA_BYTES:
        raise LayoutError(f"the metadata has {len(text)} bytes, more than {MAX_METADATA_BYTES}")
    if len(sections) > MAX_SECTIONS:
        raise LayoutError(f"{len(sections)} sections are more than {MAX_SECTIONS}")
    table = b"".join(
        _ENTRY.pack(s.name.encode("ascii"), CODINGS.index(s.coding), s.crc, s.offset, s.stored_bytes,
                    s.original_bytes, s.original_crc, 0)
        for s in sections
    )  # fmt: skip
    return text + table, len(text)


def parse_directory(preamble: Preamble, directory: bytes) -> tuple[dict[str, Any], dict[str, Section]]:
    """(metadata, sections by name, in their order). Raises LayoutError."""
    if len(directory) != preamble.directory_bytes or zlib.crc32(directory) != preamble.directory_crc:
        raise LayoutError("its directory was altered")
    try:
        metadata = json.loads(directory[: preamble.metadata_bytes])
    except (ValueError, RecursionError):
        raise LayoutError("its metadata is not JSON") from None
    if not isinstance(metadata, dict):
        raise LayoutError("its metadata is not a JSON object")
    sections: dict[str, Section] = {}
    end = ALIGNMENT
    for section in _entries(directory[preamble.metadata_bytes :]):
        if section.name in sections:
            raise LayoutError(f"it has two sections {section.name!r}")
        if section.offset != align(end) or section.end > preamble.directory_offset:
            raise LayoutError(f"its section {section.name!r} lies in the wrong place")
        sections[section.name] = section
        end = section.end
    if align(end) != preamble.directory_offset:
        raise LayoutError("its directory lies in the wrong place")
    return metadata, sections


def is_section_name(name: str) -> bool:
    """Whether a section may have this name: 1 to 40 of ``a-z 0-9 . _ / -``."""
    return name.isascii() and _NAME.fullmatch(name.encode("ascii")) is not None


def _entries(table: bytes) -> Iterator[Section]:
    for padded, coding, crc, offset, stored, original, original_crc, spare in _ENTRY.iter_unpack(table):
        name = padded.rstrip(b"\0")
        if not _NAME.fullmatch(name):
            raise LayoutError("a section has no proper name")
        shown = name.decode("ascii")
        if coding >= len(CODINGS) or spare:
            raise LayoutError(f"its section {shown!r} has the unknown coding {coding}")
        if coding == 0 and (stored != original or crc != original_crc):
            raise LayoutError(f"its raw section {shown!r} has two lengths or checksums")
        if max(stored, original) > MAX_FILE_BYTES or (coding and original > stored * kernels.ENTROPY_MAX_RATIO):
            raise LayoutError(f"its section {shown!r} claims {original} bytes from {stored}")
        yield Section(shown, CODINGS[coding], offset, stored, original, crc, original_crc)
