"""GGUF files, read defensively.

The ``gguf`` package's own reader makes Python objects for every token (18 s and 500 MB for a 150K vocabulary)
and trusts the counts it finds. This scan walks the header once with every count, length and offset checked
against the file's size before anything is allocated; big arrays are decoded only when somebody asks for them.
From the ``gguf`` package come the table of tensor types and the dequantization.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ...errors import ModelError
from .base import FileTensor, Source, SourceTensor
from .gguf_split import check_part, check_total, other_parts, split_count, whole_name

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Limits far above any real model, far below what would hurt: the largest vocabularies have 2^18 tokens.
MAX_HEADER_BYTES = 256 << 20
MAX_ARRAY_LENGTH = 1 << 22
MAX_KEY_BYTES = 1 << 16
MAX_ELEMENTS = 1 << 44
MAX_DIMENSIONS = 4
WINDOW_BYTES = 1 << 20
DEFAULT_ALIGNMENT = 32

# families whose query and key rows llama.cpp's converter permutes for interleaved rotary positions
INTERLEAVED_ROPE = ("llama", "granite", "smollm3")

STRING, ARRAY = 8, 9
# value type id -> struct code
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SCALAR_BYTES = {kind: struct.calcsize("<" + code) for kind, code in SCALARS.items()}
MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, one letter, type, one byte of value
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


class _Header:
    """A cursor over the start of the file that reads on in windows and never past the file's end."""

    def __init__(self, path: Path, file: FileIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self.bytes = bytearray()
        self._file = file

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is not a valid GGUF file: {what}; download it again")

    def ensure(self, end: int) -> None:
        """Makes the bytes up to ``end`` available."""
        if end <= len(self.bytes):
            return
        if end > self.size:
            raise self.fail(f"it ends at byte {self.size} inside its header (byte {end} is needed)")
        if end > MAX_HEADER_BYTES:
            raise self.fail(f"its header is longer than {MAX_HEADER_BYTES >> 20} MiB")
        want = min(max(end, len(self.bytes) + WINDOW_BYTES), self.size) - len(self.bytes)
        self.bytes += self._file.read(want)
        if end > len(self.bytes):
            raise self.fail(f"it ends at byte {len(self.bytes)} inside its header")

    def take(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.ensure(self.position + size)
        (value,) = struct.unpack_from("<" + code, self.bytes, self.position)
        self.position += size
        return value

    def skip(self, count: int) -> None:
        self.ensure(self.position + count)
        self.position += count

    def name(self, what: str) -> str:
        """A key or tensor name: not empty, short, valid UTF-8."""
        length = self.take("Q")
        if not 0 < length <= MAX_KEY_BYTES:
            raise self.fail(f"a {what} has {length} bytes (1 to {MAX_KEY_BYTES} are allowed)")
        start = self.position
        self.skip(length)
        try:
            return self.bytes[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"a {what} is not UTF-8") from None

    def skip_strings(self, count: int) -> None:
        """Walks ``count`` strings; a tight loop, since vocabularies have hundreds of thousands of them."""
        unpack = struct.Struct("<Q").unpack_from
        position = self.position
        for _ in range(count):
            if position + 8 > len(self.bytes):
                self.ensure(position + 8)
            position += 8 + unpack(self.bytes, position)[0]
            if position > len(self.bytes):
                self.ensure(position)
        self.position = position


class GgufMetadata(Mapping[str, Any]):
    """The key-value pairs as plain Python values; arrays become lists when first asked for, and are
    remembered.
    """

    def __init__(self, header: bytes, places: dict[str, tuple[int, int, int]]) -> None:
        # key -> (value type, count or -1 for a single value, offset in header)
        self._header = header
        self._places = places
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            kind, count, offset = self._places[key]
            self._values[key] = self._decode(kind, count, offset)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def array_length(self, key: str) -> int | None:
        """Number of elements of an array without decoding it; None when the key is absent or no array."""
        place = self._places.get(key)
        return None if place is None or place[1] < 0 else place[1]

    def exact(self, key: str) -> tuple[int, bool, Any]:
        """(type of the value or of an array's elements, is it an array, value), strings as the bytes that they are."""
        kind, count, offset = self._places[key]
        return kind, count >= 0, self._decode(kind, count, offset, raw=True)

    def _decode(self, kind: int, count: int, offset: int, *, raw: bool = False) -> Any:
        if kind != STRING:
            if count < 0:
                return struct.unpack_from("<" + SCALARS[kind], self._header, offset)[0]
            dtype = np.dtype("<" + SCALARS[kind])
            return np.frombuffer(self._header, dtype, count, offset).tolist()
        values: list[Any] = []
        for _ in range(count if count >= 0 else 1):
            (length,) = struct.unpack_from("<Q", self._header, offset)
            text = self._header[offset + 8 : offset + 8 + length]
            values.append(text if raw else text.decode("utf-8", errors="replace"))
            offset += 8 + length
        return values if count >= 0 else values[0]


def _scan_pairs(header: _Header, count: int) -> dict[str, tuple[int, int, int]]:
    places: dict[str, tuple[int, int, int]] = {}
    for _ in range(count):
        key = header.name("metadata key")
        if key in places:
            raise header.fail(f"the metadata key {key!r} appears twice")
        kind, length = header.take("I"), -1
        if kind == ARRAY:
            kind, length = header.take("I"), header.take("Q")
            if length > MAX_ARRAY_LENGTH:
                raise header.fail(f"the array {key!r} claims {length} elements (at most {MAX_ARRAY_LENGTH})")
        if kind not in SCALARS and kind != STRING:
            raise header.fail(f"{key!r} has the unknown value type {kind}")
        places[key] = (kind, length, header.position)
        if kind == STRING:
            header.skip_strings(length if length >= 0 else 1)
        else:
            header.skip(SCALAR_BYTES[kind] * (length if length >= 0 else 1))
    return places


def _scan_tensors(header: _Header, count: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """name -> (type name, row-major shape, offset in the data section, size in bytes)"""
    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = header.name("tensor name")
        if name in found:
            raise header.fail(f"the tensor {name!r} appears twice")
        dimensions = header.take("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise header.fail(
                f"tensor {name!r} has {dimensions} dimensions (1 to {MAX_DIMENSIONS} are allowed)"
            )
        extents = tuple(header.take("Q") for _ in range(dimensions))
        elements = 1
        for extent in extents:
            elements *= extent
        if not 0 < elements <= MAX_ELEMENTS:
            raise header.fail(f"tensor {name!r} has the impossible shape {list(extents)}")
        kind = header.take("I")
        try:
            type_name = gguf.GGMLQuantizationType(kind).name
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ModelError(
                f"{header.path}: tensor {name!r} has the type {kind}, which is not known; use another file"
            ) from None
        if extents[0] % block:
            raise header.fail(
                f"tensor {name!r} has rows of {extents[0]}, no multiple of the block of {type_name}, {block}"
            )
        found[name] = (type_name, extents[::-1], header.take("Q"), elements // block * block_bytes)
    return found


def _scan(path: Path, file: FileIO, size: int) -> tuple[GgufMetadata, dict[str, SourceTensor]]:
    header = _Header(path, file, size)
    if size < 24:
        raise header.fail(f"it has {size} bytes, less than the smallest header (24)")
    header.skip(4)
    if header.bytes[:4] != MAGIC:
        raise header.fail(f"it starts with {bytes(header.bytes[:4])!r}, not {MAGIC!r}")
    version = header.take("I")
    if version not in VERSIONS:
        remedy = "big-endian files are not supported" if version & 0xFFFF == 0 else "convert it to version 3"
        raise ModelError(f"{path} has GGUF version {version}; supported are {list(VERSIONS)}: {remedy}")
    tensor_count, pair_count = header.take("Q"), header.take("Q")
    if tensor_count * MIN_TENSOR_BYTES + pair_count * MIN_PAIR_BYTES > size:
        raise header.fail(
            f"it claims {tensor_count} tensors and {pair_count} keys, more than {size} bytes can hold"
        )
    places = _scan_pairs(header, pair_count)
    found = _scan_tensors(header, tensor_count)
    metadata = GgufMetadata(bytes(header.bytes[: header.position]), places)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise header.fail(f"its alignment is {alignment!r}, not a power of two up to 1 MiB")
    data_start = -(-header.position // alignment) * alignment
    tensors: dict[str, SourceTensor] = {}
    for name, (type_name, shape, offset, length) in found.items():
        if offset % alignment:
            raise header.fail(f"tensor {name!r} starts at {offset}, no multiple of the alignment {alignment}")
        if data_start + offset + length > size:
            raise header.fail(
                f"tensor {name!r} would end at byte {data_start + offset + length}, the file ends at {size} "
                "(cut short?)"
            )
        tensors[name] = FileTensor(name, type_name, shape, length, path, file, data_start + offset)
    return metadata, tensors


def open_gguf(path: Path) -> Source:
    """Opens and checks a GGUF file, and the further parts of a split one; reads only headers.

    Raises:
        ModelError: a file is missing, unreadable, cut short, or claims what cannot be.
    """
    with contextlib.ExitStack() as stack:
        file, metadata, tensors = _open_part(path, stack)
        paths, files = [path], [file]
        count = split_count(metadata)
        if count > 1:
            paths += other_parts(path, metadata)
            for number, part in enumerate(paths[1:], 1):
                file, part_metadata, found = _open_part(part, stack)
                check_part(part, part_metadata, number, count)
                twice = next((name for name in found if name in tensors), None)
                if twice is not None:
                    raise ModelError(f"{part} has the tensor {twice!r}, as an earlier part has; download it again")
                files.append(file)
                tensors |= found
            check_total(path, metadata, len(tensors))
        interleaved = metadata.get("general.architecture") in INTERLEAVED_ROPE
        name = whole_name(path) if count > 1 else path.stem
        source = Source(path, name, paths, files, metadata, tensors, interleaved_rope=interleaved)
        stack.pop_all()
    return source


def _open_part(path: Path, stack: contextlib.ExitStack) -> tuple[FileIO, GgufMetadata, dict[str, SourceTensor]]:
    try:
        file = stack.enter_context(FileIO(path))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); give the path of a .gguf file") from None
    try:
        size = file.seek(0, 2)
        file.seek(0)
        return file, *_scan(path, file, size)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from None
