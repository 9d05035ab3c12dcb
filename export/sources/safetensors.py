"""The header of a safetensors file, read defensively.

8 bytes of length, a JSON header, then the tensors' bytes without holes. Every number is checked against the
file's size before anything is read by it; the tensors themselves are read later, by ranges of rows (the
``safetensors`` library would map the whole file, and knows bfloat16 only together with a framework).
"""

from __future__ import annotations

import math
from io import FileIO
from pathlib import Path
from typing import Any, TypeGuard

from ...errors import ModelError
from .base import FileTensor
from .folder import parse_record

MAX_HEADER_BYTES = 32 << 20  # the largest shards of real models have some 100 KB
MAX_DIMENSIONS = 8
MAX_NAME = 256
MAX_EXTENT = 1 << 44
# safetensors' name -> (GGML's name of the types we read, bytes per element); "" where there is none
TYPES = {
    "F32": ("F32", 4), "F16": ("F16", 2), "BF16": ("BF16", 2), "F64": ("", 8), "I64": ("", 8), "I32": ("", 4),
    "I16": ("", 2), "I8": ("", 1), "U64": ("", 8), "U32": ("", 4), "U16": ("", 2), "U8": ("", 1), "BOOL": ("", 1),
    "F8_E4M3": ("", 1), "F8_E5M2": ("", 1), "F8_E8M0": ("", 1), "C64": ("", 8),
}  # fmt: skip


def read_safetensors(path: Path, file: FileIO) -> dict[str, FileTensor]:
    """Name -> tensor of an open file. The type name is empty where a tensor's type is not one that can be used.

    Raises:
        ModelError: the file is cut short, or its header claims what cannot be.
    """
    try:
        size = file.seek(0, 2)
        file.seek(0)
        if size < 8:
            raise _damaged(path, f"it has {size} bytes, less than the smallest header")
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise _damaged(path, f"its header would end at byte {8 + length}, the file ends at {size} (cut short?)")
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, f"its header has {length} bytes (at most {MAX_HEADER_BYTES} are allowed)")
        header = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from None
    if len(header) != length or not header.startswith(b"{"):
        raise _damaged(path, "its header is no JSON object")
    record = parse_record(header, path)
    record.pop("__metadata__", None)
    start, room = 8 + length, size - 8 - length
    tensors = {name: _tensor(path, file, name, entry, start, room) for name, entry in record.items()}
    _check_layout(path, list(tensors.values()), start, size)
    return tensors


def _tensor(path: Path, file: FileIO, name: str, entry: Any, start: int, room: int) -> FileTensor:
    shown = name[:100]
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise _damaged(path, f"it has the tensor name {shown!r}")
    if not isinstance(entry, dict):
        raise _damaged(path, f"tensor {shown!r} has no record")
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise ModelError(
            f"{path}: tensor {shown!r} has the type {dtype!r:.40}, which is not known; use a model in BF16, F16 or F32"
        )
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or math.prod(shape) > MAX_EXTENT:
        raise _damaged(path, f"tensor {shown!r} has the impossible shape {shape!r:.80}")
    if not _are_counts(place) or len(place) != 2 or not place[0] <= place[1] <= room:
        raise _damaged(path, f"tensor {shown!r} lies at {place!r:.80}, outside of the {room} bytes of data")
    type_name, width = TYPES[dtype]
    size = math.prod(shape) * width
    if size != place[1] - place[0]:
        raise _damaged(path, f"tensor {shown!r} takes {size} bytes but has {place[1] - place[0]}")
    return FileTensor(name, type_name, tuple(shape) or (1,), size, path, file, start + place[0])


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    """A list of whole numbers from 0 on that 64 bits can hold."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(path: Path, tensors: list[FileTensor], start: int, size: int) -> None:
    """The tensors fill the file: none over another, no bytes between them that nobody accounts for."""
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset != end:
            what = "overlaps another one" if tensor.offset < end else "starts behind a hole"
            raise _damaged(path, f"tensor {tensor.name[:100]!r} {what}")
        end += tensor.size
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end}, the file at {size}")


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is not a valid safetensors file: {what}; download it again")
