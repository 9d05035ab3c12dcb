"""Block-quantized weights in one canonical form, and the exact carry-over of GGML's block types into it.

w[n, k] = scale[n, k // block] · code[n, k] (+ min[n, k // block]), y = x Wᵀ. Bit layouts of the GGML types:
the comments of ggml-common.h and ggml-quants.c; every decoder here is tested against ``gguf.dequantize``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

ROWS_PER_PANEL = 16
COLUMN_STEP = 32

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockFormat:
    """How a quantized matrix is stored: ``bits`` per code, ``block`` columns per scale, with a minimum or
    without.
    """

    bits: int
    block: int
    has_min: bool = False

    def __post_init__(self) -> None:
        allowed = self.bits in (4, 5) if self.has_min else self.bits in (4, 5, 6, 8)
        if not allowed or self.block not in (16, 32):
            raise ValueError(f"no such block format: {self}")

    @property
    def zero(self) -> int:
        """What is added to a signed code to store it; 8-bit codes are stored as int8 bytes."""
        return 0 if self.has_min or self.bits == 8 else 1 << (self.bits - 1)

    @property
    def record_bytes(self) -> int:
        """Bytes of 16 rows of one block."""
        return ROWS_PER_PANEL * 2 * (2 if self.has_min else 1) + ROWS_PER_PANEL * self.block * self.bits // 8

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a whole packed matrix."""
        return -(-rows // ROWS_PER_PANEL) * (columns // self.block) * self.record_bytes


@dataclass(frozen=True)
class BlockTensor:
    """Some rows of a quantized matrix.

    ``codes`` uint8 [rows, columns] holds code + zero (8 bits: the int8 code's byte); ``scales`` and ``mins``
    are float32 [rows, columns / block].
    """

    format: BlockFormat
    codes: Bytes
    scales: Floats
    mins: Floats | None = None

    def dequantize(self) -> Floats:
        """float32 [rows, columns]."""
        rows, columns = self.codes.shape
        codes = self.codes.view(np.int8) if self.format.bits == 8 else self.codes
        values = codes.reshape(rows, -1, self.format.block).astype(np.float32) - np.float32(self.format.zero)
        values *= self.scales[:, :, None]
        if self.mins is not None:
            values += self.mins[:, :, None]
        result: Floats = values.reshape(rows, columns)
        return result

    def take_rows(self, order: npt.NDArray[np.intp]) -> BlockTensor:
        """The rows in another order."""
        mins = None if self.mins is None else self.mins[order]
        return BlockTensor(self.format, self.codes[order], self.scales[order], mins)

    def largest_factor(self) -> float:
        """Largest magnitude among scales and minima; NaN when one of them is."""
        largest = float(np.abs(self.scales).max(initial=0.0))
        return (
            largest if self.mins is None else float(np.maximum(largest, np.abs(self.mins).max(initial=0.0)))
        )


@dataclass(frozen=True)
class CarriedType:
    """A GGML type whose codes fit our formats; ``half_factors``: its scales are float16 already."""

    format: BlockFormat
    half_factors: bool
    decode: Callable[[Bytes], tuple[Bytes, Floats, Floats | None]]


def _half(data: Bytes) -> Floats:
    """uint8 [blocks, 2n] → float32 [blocks, n]"""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """Low nibbles of all bytes, then the high ones: uint8 [..., n] → [..., 2n]."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _join(low: Bytes, high: Bytes) -> Bytes:
    """Codes from their low nibbles and the bits above."""
    codes: Bytes = low | high << np.uint8(4)
    return codes


def _bit_rows(data: Bytes) -> Bytes:
    """The 32 bits of 4 bytes in order: uint8 [blocks, 4] → [blocks, 32] of 0 or 1."""
    return np.unpackbits(data, axis=-1, bitorder="little")


def _q4_0(raw: Bytes) -> tuple[Bytes, Floats, Floats | None]:
    return _nibbles(raw[:, 2:]), _half(raw[:, :2]), None


def _q4_1(raw: Bytes) -> tuple[Bytes, Floats, Floats | None]:
    return _nibbles(raw[:, 4:]), _half(raw[:, :2]), _half(raw[:, 2:4])


def _q5_0(raw: Bytes) -> tuple[Bytes, Floats, Floats | None]:
    return _join(_nibbles(raw[:, 6:]), _bit_rows(raw[:, 2:6])), _half(raw[:, :2]), None


def _q5_1(raw: Bytes) -> tuple[Bytes, Floats, Floats | None]:
    return _join(_nibbles(raw[:, 8:]), _bit_rows(raw[:, 4:8])), _half(raw[:, :2]), _half(raw[:, 2:4])


def _q8_0(raw: Bytes) -> tuple[Bytes, Floats, Floats | None]:
    return raw[:, 2:], _half(raw[:, :2]), None


def _k_factors(raw: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima of the eight blocks of a Q4_K or Q5_K super-block: float32 [supers, 8] each."""
    packed = raw[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return _half(raw[:, :2]) * scales, -(_half(raw[:, 2:4]) * minima)


def _q4_k(raw: Bytes) -> tuple[Bytes, Floats, Floats | None]:
    return _nibbles(raw[:, 16:].reshape(-1, 4, 32)), *_k_factors(raw)


def _q5_k(raw: Bytes) -> tuple[Bytes, Floats, Floats | None]:
    high = raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & np.uint8(1)
    codes = _join(_nibbles(raw[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32), high)
    return codes, *_k_factors(raw)


def _q6_k(raw: Bytes) -> tuple[Bytes, Floats, Floats | None]:
    low = _nibbles(raw[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)
    scales = raw[:, 192:208].view(np.int8).astype(np.float32)
    return _join(low, high), _half(raw[:, 208:210]) * scales, None


CARRIED: dict[str, CarriedType] = {
    "Q4_0": CarriedType(BlockFormat(4, 32), True, _q4_0),
    "Q4_1": CarriedType(BlockFormat(4, 32, has_min=True), True, _q4_1),
    "Q5_0": CarriedType(BlockFormat(5, 32), True, _q5_0),
    "Q5_1": CarriedType(BlockFormat(5, 32, has_min=True), True, _q5_1),
    "Q8_0": CarriedType(BlockFormat(8, 32), True, _q8_0),
    "Q4_K": CarriedType(BlockFormat(4, 32, has_min=True), False, _q4_k),
    "Q5_K": CarriedType(BlockFormat(5, 32, has_min=True), False, _q5_k),
    "Q6_K": CarriedType(BlockFormat(6, 16), False, _q6_k),
}


def carry_over(raw: Bytes, type_name: str) -> BlockTensor:
    """Decodes rows of a type in ``CARRIED`` without changing a code: raw uint8 [rows, row_bytes]."""
    carried = CARRIED[type_name]
    rows = len(raw)
    _, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    codes, scales, mins = carried.decode(raw.reshape(-1, block_bytes))
    codes = np.ascontiguousarray(codes).reshape(rows, -1)
    return BlockTensor(
        carried.format, codes, scales.reshape(rows, -1), None if mins is None else mins.reshape(rows, -1)
    )


def to_float(raw: Bytes, type_name: str) -> Floats:
    """Rows of any readable type as float32 [rows, columns]."""
    rows = len(raw)
    with np.errstate(all="ignore"):  # damaged weights are found later, by name
        values: npt.NDArray[Any] = gguf.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    return values.reshape(rows, -1).astype(np.float32, copy=False)


@functools.cache
def is_readable(type_name: str) -> bool:
    """Whether ``to_float`` knows this GGML type."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    try:
        to_float(np.zeros((1, block_bytes), np.uint8), type_name)
    except NotImplementedError:
        return False
    return True
