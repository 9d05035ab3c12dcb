"""Tensors that are not in a file in the form in which a GGUF file would have them.

Each reads only what is asked for, so that a source stays as small in memory as the file tensors it is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..blocks import to_float
from .base import FileTensor, SourceTensor

BAND_BYTES = 16 << 20


@dataclass(frozen=True)
class MemoryTensor(SourceTensor):
    """A few float32 numbers that the metadata says, for example frequency factors."""

    values: npt.NDArray[np.float32]

    def read_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        return self.values.reshape(self.rows, -1)[start:stop].view(np.uint8)


def memory_tensor(name: str, values: Sequence[float], path: Path) -> MemoryTensor:
    """``values`` as a float32 vector."""
    array = np.asarray(values, np.float32)
    return MemoryTensor(name, "F32", array.shape, array.nbytes, path, array)


@dataclass(frozen=True)
class ShiftedTensor(SourceTensor):
    """float32 of another float tensor plus a constant.

    Gemma's norms multiply by 1 + weight; its GGUF files have the 1 in the weight, its safetensors have not.
    """

    inner: SourceTensor
    shift: float

    def read_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        values = to_float(self.inner.read_rows(start, stop), self.inner.type_name)
        shifted: npt.NDArray[np.float32] = values + np.float32(self.shift)
        return shifted.view(np.uint8)


def shifted_tensor(inner: SourceTensor, shift: float) -> SourceTensor:
    """``inner`` + ``shift`` in float32; of a shift and its opposite nothing is left, and nothing is rounded."""
    if isinstance(inner, ShiftedTensor) and inner.shift == -shift:
        return inner.inner
    size = 4 * inner.rows * inner.columns
    return ShiftedTensor(inner.name, "F32", inner.shape, size, inner.path, inner, shift)


@dataclass(frozen=True)
class StackedTensor(SourceTensor):
    """Equal tensors one after the other along a new first dimension: the experts of a layer."""

    parts: tuple[SourceTensor, ...]

    def read_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        out = np.empty((stop - start, self.row_bytes), np.uint8)
        rows = self.parts[0].rows
        at = start
        while at < stop:
            part, first = divmod(at, rows)
            last = min(rows, first + stop - at)
            out[at - start : at - start + last - first] = self.parts[part].read_rows(first, last)
            at += last - first
        return out


def stacked_tensor(name: str, parts: Sequence[SourceTensor]) -> StackedTensor:
    """The parts, of one type and shape, as one tensor [parts, …]."""
    first = parts[0]
    shape = (len(parts), *first.shape)
    return StackedTensor(name, first.type_name, shape, len(parts) * first.size, first.path, tuple(parts))


class BandReader:
    """Columns of matrices in files, as many at a time as BAND_BYTES allow; the last ones read are kept.

    Whoever reads a matrix that lies transposed asks for a few columns at a time; each would be a read of some bytes
    per row. One reader serves all matrices of a source, so that there is one band in memory, not one for each.
    """

    def __init__(self) -> None:
        self._tensor: FileTensor | None = None
        self._first = 0
        self._band: npt.NDArray[Any] = np.empty((0, 0), np.uint8)

    def columns(self, tensor: FileTensor, start: int) -> npt.NDArray[Any]:
        """[rows, n] from column ``start`` on as unsigned integers of the elements' size; n ≥ 1 as there are."""
        at = start - self._first
        if tensor is not self._tensor or not 0 <= at < self._band.shape[1]:
            self._tensor = None  # a failed read leaves no band
            width = tensor.row_bytes // tensor.columns
            count = min(tensor.columns - start, max(BAND_BYTES // (tensor.rows * width), 1))
            band = np.empty((tensor.rows, count), f"<u{width}")
            tensor.read_columns(start, band)
            self._tensor, self._first, self._band, at = tensor, start, band, 0
        return self._band[:, at:]


@dataclass(frozen=True)
class TransposedTensor(SourceTensor):
    """A matrix [out, in] that lies in its file as [in, out]."""

    inner: FileTensor
    bands: BandReader

    def read_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        width = self.row_bytes // self.columns
        out = np.empty((stop - start, self.columns), f"<u{width}")
        at = start
        while at < stop:
            band = self.bands.columns(self.inner, at)[:, : stop - at]
            out[at - start : at - start + band.shape[1]] = band.T
            at += band.shape[1]
        return out.view(np.uint8)


def row_range(tensor: FileTensor, start: int, shape: tuple[int, ...]) -> FileTensor:
    """A piece of a tensor in its file: the rows from ``start`` on, as many as ``shape`` has."""
    piece = replace(tensor, shape=shape, offset=tensor.offset + start * tensor.row_bytes)
    return replace(piece, size=piece.rows * tensor.row_bytes)
