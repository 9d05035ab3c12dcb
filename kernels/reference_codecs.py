"""Slow and obvious NumPy twin of the codecs: the same bytes, one block and one token at a time.

``kernels/native/codec.h`` has the layout of a block. Encoding is float32 in the native code's order of operations, so
that bytes can be compared; decoding is float64. Letters: D head size, T tokens; a block has 16 tokens.

Bytes may differ from the native ones only on a tie: where two clip factors, or two levels, fit a number equally well up
to float32's rounding (a compiler that fuses products and sums could decide it the other way; ours is told not to).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK = 16
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
LARGEST_HALF = 65504.0
GROUP_REACH = np.array(
    [32.0, 8.0, 6.062866, 4.594793, 3.482202, 2.639016, 2.0, 1.5157166, 1.1486984, 0.8705506, 0.6597540, 0.5,
     0.37892914, 0.28717459, 0.21763764, 0.16493849], np.float32,
)  # fmt: skip
K_MEANS_STEPS, ROUNDS, SAMPLED = 40, 3, 1 << 14

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Half = np.floating[Any]


@dataclass(frozen=True)
class LowRank:
    """A side as R coefficients: ``mean`` [D], ``encoder`` [D, R], ``decoder`` [R, D], float32; of pairs 2D in the place
    of D, keys before values."""

    mean: Singles
    encoder: Singles
    decoder: Singles

    def coefficients(self, x: ArrayLike) -> Singles:
        """Of ``x`` [T, D]: float32 [T, P], P = R rounded up to a multiple of 16, the rest zero. NaN is the mean."""
        given = np.asarray(x, np.float32)
        bounded = np.clip(given, -LARGEST_HALF, LARGEST_HALF)
        rest = np.where(np.isnan(given), 0.0, bounded.astype(np.float64) - self.mean)
        found = (rest @ self.encoder.astype(np.float64)).astype(np.float32)
        return np.pad(found, ((0, 0), (0, -found.shape[1] % 16)))

    def mean_coefficients(self, x: ArrayLike) -> Singles:
        """float32 [R]: the mean over ``x`` [T, D]."""
        given = np.asarray(x, np.float32)
        bounded = np.clip(given, -LARGEST_HALF, LARGEST_HALF)
        distance = np.where(np.isnan(given), 0.0, bounded.astype(np.float64) - self.mean).mean(axis=0)
        found: Singles = (distance @ self.encoder.astype(np.float64)).astype(np.float32)
        return found

    def added(self, coefficients: Floats) -> Floats:
        """float64 [T, D] from [T, R]: what comes to the mean."""
        x: Floats = coefficients @ self.decoder.astype(np.float64)
        return x


@dataclass(frozen=True)
class Side:
    """How the keys, or the values, of a block are written. ``levels`` None: evenly spaced ones.

    ``center`` and ``spread`` are float32 [D]; ``keys`` says channel-major [D][16] instead of token-major [16][D]. With
    ``low`` they are of the coefficients, [P], and the side is channel-major whether keys or values.
    """

    bits: int
    outliers: int
    center: Singles
    spread: Singles
    levels: Singles | None
    keys: bool
    grouped: bool = False
    low: LowRank | None = None

    @cached_property
    def all_levels(self) -> Singles:
        """What a code stands for, ascending; 8 bits: -127 to 127, so code 0 is -127."""
        if self.levels is not None:
            return self.levels
        if self.bits == 8:
            return np.arange(-127, 128, dtype=np.float32)
        even: Singles = (np.arange(2**self.bits) - (2**self.bits - 1) / 2).astype(np.float32)
        return even

    @cached_property
    def reach(self) -> float:
        """The size of the outermost level."""
        return float(np.abs(self.all_levels).max()) or 1.0

    @property
    def clips(self) -> tuple[float, ...]:
        return {8: CLIPS[:1], 4: CLIPS[:4]}.get(self.bits, CLIPS)

    def bytes(self, head_size: int) -> tuple[int, int, int]:
        """Of scales, outliers and runs."""
        small, stored = self.bits < 16, self.stored(head_size)
        return (stored if self.grouped else 32) * small, 4 * self.outliers * small, 2 * self.bits * stored

    def stored(self, head_size: int) -> int:
        """Numbers of each token in a block."""
        return head_size if self.low is None else self.low.decoder.shape[0]


def block_bytes(keys: Side, values: Side, head_size: int, rest: LowRank | None = None) -> int:
    return -(-(sum(keys.bytes(head_size)) + sum(values.bytes(head_size)) + rest_bytes(rest)) // 16) * 16


def rest_bytes(rest: LowRank | None) -> int:
    """Of what pairs leave out: a scale, and 4 bits for each coefficient."""
    return 0 if rest is None else 2 + (rest.decoder.shape[0] + 1) // 2


def encode_block(keys: Side, values: Side, k: ArrayLike, v: ArrayLike, rest: LowRank | None = None) -> Bytes:
    """A block as uint8, from 16 keys before RoPE and values [16, D]."""
    if keys.low is not None and values.low is not None:
        k = v = np.hstack([np.asarray(k, np.float32), np.asarray(v, np.float32)])
    parts = zip(encode_side(keys, k), encode_side(values, v), strict=True)
    block = np.concatenate([part for pair in parts for part in pair])
    if rest is not None:
        block = np.concatenate([block, encode_rest(rest.mean_coefficients(k))])
    return np.concatenate([block, np.zeros(-block.size % 16, np.uint8)])


def decode_block(
    keys: Side, values: Side, head_size: int, block: Bytes, rest: LowRank | None = None
) -> tuple[Floats, Floats]:
    """Keys and values, float64 [16, D] both."""
    sizes = [size for pair in zip(keys.bytes(head_size), values.bytes(head_size), strict=True) for size in pair]
    *parts, behind = np.split(block, np.cumsum(sizes))
    k, v = decode_side(keys, head_size, *parts[0::2]), decode_side(values, head_size, *parts[1::2])
    if keys.low is None or values.low is None:
        k = k if keys.low is None else keys.low.mean + keys.low.added(k)
        return k, v if values.low is None else values.low.mean + values.low.added(v)
    pairs = keys.low.mean + keys.low.added(k) + values.low.added(v)
    if rest is not None:
        pairs = pairs + rest.added(decode_rest(behind, rest.decoder.shape[0]))
    return pairs[:, :head_size], pairs[:, head_size:]


def encode_rest(coefficients: Singles) -> Bytes:
    """Scale, then two codes a byte."""
    scale = to_half(np.abs(coefficients).max() / np.float32(7.5))
    inverse = np.float32(1) / np.float32(scale) if scale > 0 else np.float32(0)
    codes = np.clip(coefficients * inverse + np.float32(8), 0, np.float32(15.5)).astype(np.uint8)
    codes = np.pad(codes, (0, codes.size % 2))
    return np.concatenate([as_bytes(np.array([scale], np.float16)), codes[::2] | codes[1::2] << 4])


def decode_rest(part: Bytes, count: int) -> Floats:
    """float64 [count]."""
    scale = float(np.frombuffer(part[:2].tobytes(), "<f2")[0])
    codes = np.stack([part[2:] & 15, part[2:] >> 4], axis=1).ravel()[:count]
    found: Floats = scale * (codes.astype(np.float64) - 7.5)
    return found


def encode_side(side: Side, x: ArrayLike) -> tuple[Bytes, Bytes, Bytes]:
    """Bytes of the scales, the outliers and the runs of ``x`` [16, D]."""
    given = np.asarray(x, np.float32) if side.low is None else side.low.coefficients(x)
    runs_stored = side.stored(given.shape[1])
    nothing = np.zeros(0, np.uint8)
    if side.bits == 16:
        halves = to_half(laid_out(side, np.nan_to_num(given, nan=0.0))).reshape(-1, 16)
        return nothing, nothing, as_bytes(halves[:runs_stored])
    normal = normalise(side, given)
    indices = outlier_indices(side, normal)
    clean = np.where(np.isnan(given), side.center, given)
    numbers = to_half(laid_out(side, clean).ravel()[indices])
    outliers = np.stack([indices.astype("<u2"), numbers.view("<u2")], axis=1)
    normal = without(side, normal, indices)
    if side.grouped:
        groups, _, runs = encode_groups(side, normal)
        return groups[:runs_stored], nothing, runs[: 2 * side.bits * runs_stored]
    scales = np.array([choose_scale(side, row) for row in normal], np.float16)
    codes = np.stack([nearest(side, row, scale) for row, scale in zip(normal, scales, strict=True)])
    runs = laid_out(side, codes).reshape(-1, 16)[:runs_stored]
    return as_bytes(scales), as_bytes(outliers), np.concatenate([pack_run(side.bits, run) for run in runs])


def decode_side(side: Side, head_size: int, scales: Bytes, outliers: Bytes, runs: Bytes) -> Floats:
    """float64 [16, D], or [16, R] coefficients, from what `encode_side` makes."""
    if side.low is not None:
        rank = side.stored(head_size)
        plain = replace(side, center=side.center[:rank], spread=side.spread[:rank], low=None)
        return decode_side(plain, rank, scales, outliers, runs)
    if side.bits == 16:
        return token_major(side, np.frombuffer(runs.tobytes(), "<f2").astype(np.float64), head_size)
    packed = runs.reshape(-1, 2 * side.bits)
    codes = token_major(side, np.concatenate([unpack_run(side.bits, run) for run in packed]), head_size)
    if side.grouped:
        offset = ((scales & 15) - 7.5) / 4
        reach = np.array(GROUP_REACH)[scales >> 4]
        level = codes - (127.0 if side.bits == 8 else side.reach)
        grouped: Floats = side.center + side.spread.astype(np.float64) * (offset + reach / side.reach * level)
        return grouped
    levels = codes - 127.0 if side.bits == 8 else side.all_levels[codes].astype(np.float64)
    scale = np.frombuffer(scales.tobytes(), "<f2").astype(np.float64)[:, None]
    restored = side.center.astype(np.float64) + side.spread.astype(np.float64) * scale * levels
    flat = laid_out(side, restored).ravel()
    for index, number in outliers.view("<u2").reshape(-1, 2):
        flat[index] = np.array([number], "<u2").view("<f2")[0]
    return token_major(side, flat, head_size)


def encode_groups(side: Side, normal: Singles) -> tuple[Bytes, Bytes, Bytes]:
    """The grouped form: a byte and 16 codes for each channel."""
    groups, columns = [], []
    for column in normal.T:
        middle = np.float32(0.5) * (column.min() + column.max())
        offset = int(np.clip(np.floor(middle * np.float32(4) + np.float32(8)), 0, 15))
        rest = column - np.float32((offset - 7.5) / 4)
        covering = [i for i in range(1, 16) if GROUP_REACH[i] >= np.abs(rest).max()]
        tries = range(max(covering, default=0), 16)[:3]
        scales = [GROUP_REACH[i] / np.float32(side.reach) for i in tries]
        best = int(np.argmin([squared_error(side, rest, scale) for scale in scales]))
        groups.append(offset | tries[best] << 4)
        columns.append(nearest(side, rest, scales[best]))
    runs = laid_out(side, np.stack(columns, axis=1)).reshape(-1, 16)
    packed = np.concatenate([pack_run(side.bits, run) for run in runs])
    return np.array(groups, np.uint8), np.zeros(0, np.uint8), packed


def normalise(side: Side, x: Singles) -> Singles:
    """Centred and divided by the spread; NaN is the center."""
    inverse = np.float32(1) / side.spread
    bounded = np.clip(np.where(np.isnan(x), np.float32(0), x), np.float32(-LARGEST_HALF), np.float32(LARGEST_HALF))
    normal: Singles = np.where(np.isnan(x), np.float32(0), (bounded - side.center) * inverse)
    return normal


def outlier_indices(side: Side, normal: Singles) -> Integers:
    """Of the largest, into the side's layout, ascending; of equal ones the first."""
    order = np.argsort(-np.abs(laid_out(side, normal).ravel()), kind="stable")
    return np.sort(order[: side.outliers]).astype(np.int64)


def without(side: Side, normal: Singles, indices: Integers) -> Singles:
    flat = laid_out(side, normal).ravel().copy()
    flat[indices] = 0
    return token_major(side, flat, normal.shape[1])


def choose_scale(side: Side, row: Singles) -> Half:
    """The clip factor with the least squared error; the first of equal ones."""
    widest = np.abs(row).max() / np.float32(side.reach)
    scales = [to_half(widest * np.float32(clip)) for clip in side.clips]
    best: Half = scales[int(np.argmin([squared_error(side, row, scale) for scale in scales]))]
    return best


def squared_error(side: Side, row: Singles, scale: Half) -> float:
    """Sixteen partial sums, then these: the order of the native code."""
    error = row - np.float32(scale) * side.all_levels[nearest(side, row, scale)]
    sums = np.zeros(16, np.float32)
    for part in (error * error).reshape(-1, 16):
        sums = sums + part
    four = (sums[0:4] + sums[8:12]) + (sums[4:8] + sums[12:16])
    return float((four[0] + four[2]) + (four[1] + four[3]))


def nearest(side: Side, row: Singles, scale: Half) -> Integers:
    """Codes [D]; of two levels equally near, the upper one."""
    inverse = np.float32(1) / np.float32(scale) if scale > 0 else np.float32(0)
    scaled = row * inverse
    if side.levels is not None:
        borders = np.float32(0.5) * (side.levels[:-1] + side.levels[1:])
        codes: NDArray[Any] = (scaled[:, None] >= borders).sum(axis=1)
    elif side.bits == 8:
        codes = np.floor(np.clip(scaled, np.float32(-127), np.float32(127)) + np.float32(127.5))
    else:
        codes = np.clip(np.floor(scaled + np.float32(2 ** (side.bits - 1))), 0, 2**side.bits - 1)
    return codes.astype(np.int64)


def pack_run(bits: int, code: Integers) -> Bytes:
    if bits == 8:
        return (code - 127).astype(np.int8).view(np.uint8)
    if bits == 4:
        return (code[:8] | code[8:] << 4).astype(np.uint8)
    low = code & 3
    pairs = (low[0:4] | low[4:8] << 2 | low[8:12] << 4 | low[12:16] << 6).astype(np.uint8)
    if bits == 2:
        return pairs
    high = int(sum((int(c) >> 2) << j for j, c in enumerate(code)))
    return np.concatenate([pairs, np.array([high & 255, high >> 8], np.uint8)])


def unpack_run(bits: int, run: Bytes) -> Integers:
    if bits == 8:
        return run.view(np.int8).astype(np.int64) + 127
    if bits == 4:
        return np.concatenate([run & 15, run >> 4]).astype(np.int64)
    code = np.concatenate([run[:4] >> shift & 3 for shift in (0, 2, 4, 6)]).astype(np.int64)
    if bits == 3:
        plane = int(run[4]) | int(run[5]) << 8
        code += np.array([(plane >> j & 1) << 2 for j in range(16)])
    return code


def calibrate_side(bits: int, x: ArrayLike, *, keys: bool, outliers: int = 0, nonuniform: bool = False) -> Side:
    """Center, spread and levels from a sample [T, D]: mean and standard deviation of the channels, 1-D k-means."""
    given = np.asarray(x, np.float64)
    bounded = np.clip(given, -LARGEST_HALF, LARGEST_HALF)  # NaN stays NaN, and is left out
    center = np.array([_mean(column) for column in bounded.T])
    squares = np.array([_mean(column) for column in ((bounded - center) ** 2).T])
    spread = np.maximum(np.sqrt(squares), max(np.sqrt(squares.mean()) / 64, 1e-6))
    side = Side(bits, outliers, center.astype(np.float32), spread.astype(np.float32), None, keys)
    if not nonuniform or bits > 4:
        return side
    levels = (side.all_levels / side.reach).astype(np.float32)
    rows = np.concatenate(list(_sample(side, np.asarray(x, np.float32))))
    for _ in range(ROUNDS):
        side = Side(bits, outliers, side.center, side.spread, levels, keys)
        scales = [choose_scale(side, row) for row in rows]
        kept = [(row, scale) for row, scale in zip(rows, scales, strict=True) if scale > 0]
        numbers = [np.clip(row * (np.float32(1) / np.float32(scale)), -2, 2) for row, scale in kept]
        weights = [np.full(row.size, float(scale) ** 2) for row, scale in kept]
        if kept:
            levels = k_means(levels, np.concatenate(numbers), np.concatenate(weights))
    return Side(bits, outliers, side.center, side.spread, levels, keys)


def _mean(column: Floats) -> float:
    known = column[~np.isnan(column)]
    return float(known.mean()) if known.size else 0.0


def _sample(side: Side, x: Singles) -> Iterator[Singles]:
    """Blocks evenly spaced over the sample, normalised, without their outliers."""
    blocks, size = len(x) // BLOCK, x.shape[1]
    used = min(blocks, max(1, SAMPLED // (BLOCK * size)))
    for number in range(used):
        first = number * blocks // used * BLOCK
        normal = normalise(side, x[first : first + BLOCK])
        yield without(side, normal, outlier_indices(side, normal))


def k_means(levels: Singles, numbers: NDArray[Any], weights: Floats) -> Singles:
    """Lloyd's algorithm from ``levels``; a level whose cell is empty stays."""
    for _ in range(K_MEANS_STEPS):
        borders = np.float32(0.5) * (levels[:-1] + levels[1:])
        cells = (numbers[:, None] >= borders).sum(axis=1)
        total = np.bincount(cells, weights, minlength=levels.size)
        moment = np.bincount(cells, weights * numbers, minlength=levels.size)
        moved = np.where(total > 0, moment / np.where(total > 0, total, 1), levels).astype(np.float32)
        if np.array_equal(moved, levels):
            break
        levels = moved
    return levels


def laid_out(side: Side, x: NDArray[Any]) -> NDArray[Any]:
    """[16, D] in the side's order."""
    return x.T if side.keys else x


def token_major(side: Side, flat: NDArray[Any], head_size: int) -> NDArray[Any]:
    """[16, D] from numbers in the side's order."""
    return flat.reshape(head_size, BLOCK).T if side.keys else flat.reshape(BLOCK, head_size)


def to_half(x: Any) -> Any:
    return np.clip(x, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)


def as_bytes(x: NDArray[Any]) -> Bytes:
    """Little-endian."""
    return np.frombuffer(np.ascontiguousarray(x.astype(x.dtype.newbyteorder("<"))).tobytes(), np.uint8)
