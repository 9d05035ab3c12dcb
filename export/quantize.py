"""Float weights to codes with little error: the choice of scale is a small least-squares search per block.

Rounding straight to the block's range wastes levels on one outlier. For each block a few ranges are tried;
given the codes, the best factors have a closed form (linear regression of the weights on the codes), and the
trial with the least squared error wins. All blocks of a chunk are searched at once.
"""

from __future__ import annotations

import numpy as np

from .blocks import BlockFormat, BlockTensor, Bytes, Floats
from .packing import round_factors

# numbers of levels that the trials spread a block's range over, relative to the levels that exist: above 1
# the range is cut at its ends, below 1 it is left partly unused. Symmetric 8 bits gain nothing from more than
# two.
TRIALS = {4: (1.0, 0.95, 1.04, 1.08, 1.12, 1.17, 1.22, 1.28, 1.34), 8: (1.0, 1.004)}
# rounds of codes → factors → codes after the search: each lowers the error, by less and less
REFINEMENTS = 2
HALF_MAX = 65504.0

EIGHT = BlockFormat(8, 32)
FOUR = BlockFormat(4, 32, has_min=True)


def quantize(values: Floats, form: BlockFormat, multiplier: float) -> BlockTensor:
    """float32 [rows, columns] → codes and factors, the factors already as float16 storage rounds them."""
    rows, columns = values.shape
    blocks = values.reshape(-1, form.block)
    search = _with_min if form.has_min else _symmetric
    codes, scales, mins = search(blocks, form.bits, multiplier)
    shape = (rows, columns // form.block)
    return BlockTensor(
        form,
        codes.reshape(rows, columns),
        scales.reshape(shape),
        None if mins is None else mins.reshape(shape),
    )


def stored_factors(factors: Floats, multiplier: float) -> Floats:
    """What the kernel will see of ``factors``: rounded to float16 times the multiplier."""
    limit = np.float32(HALF_MAX * multiplier)
    rounded = round_factors(np.clip(factors, -limit, limit), multiplier).astype(np.float32)
    result: Floats = rounded * np.float32(multiplier)
    return result


def _inverse(scales: Floats) -> Floats:
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)


def _symmetric(blocks: Floats, bits: int, multiplier: float) -> tuple[Bytes, Floats, None]:
    top = (1 << (bits - 1)) - 1
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    best_scale = best_error = None
    for trial in TRIALS[bits]:
        codes = np.clip(np.rint(blocks * _inverse(largest / np.float32(top * trial))), -top, top)
        square = np.einsum("bk,bk->b", codes, codes)[:, None]
        scale = np.einsum("bk,bk->b", blocks, codes)[:, None] * _inverse(square)
        rest = blocks - codes * scale
        error = np.einsum("bk,bk->b", rest, rest)[:, None]
        if best_scale is None or best_error is None:
            best_scale, best_error = scale, error
        else:
            better = error < best_error
            best_scale, best_error = np.where(better, scale, best_scale), np.where(better, error, best_error)
    assert best_scale is not None
    scales = stored_factors(best_scale, multiplier)
    codes = np.clip(np.rint(blocks * _inverse(scales)), -top, top)
    return codes.astype(np.int8).view(np.uint8), scales, None


def _with_min(blocks: Floats, bits: int, multiplier: float) -> tuple[Bytes, Floats, Floats]:
    top = (1 << bits) - 1
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    middle = (low + high) / 2
    best_scale, best_min = (high - low) / np.float32(top), low
    best_error = np.full_like(low, np.inf)
    for trial in TRIALS[bits]:
        step = (high - low) / np.float32(top * trial)
        scale, mins, error = _regression(
            blocks, _codes(blocks, step, middle - step * np.float32(top / 2), top)
        )
        better = error < best_error
        best_scale, best_min = np.where(better, scale, best_scale), np.where(better, mins, best_min)
        best_error = np.where(better, error, best_error)
    for _ in range(REFINEMENTS):
        best_scale, best_min, _ = _regression(blocks, _codes(blocks, best_scale, best_min, top))
    scales, mins = stored_factors(best_scale, multiplier), stored_factors(best_min, multiplier)
    return _codes(blocks, scales, mins, top).astype(np.uint8), scales, mins


def _codes(blocks: Floats, scales: Floats, mins: Floats, top: int) -> Floats:
    """The nearest codes, still as floats."""
    codes: Floats = np.clip(np.rint((blocks - mins) * _inverse(scales)), 0, top)
    return codes


def _regression(blocks: Floats, codes: Floats) -> tuple[Floats, Floats, Floats]:
    """Scale and minimum of each block that fit its codes best, and the squared error that is left."""
    count, total = blocks.shape[1], blocks.sum(axis=1, keepdims=True)
    first, square = codes.sum(axis=1, keepdims=True), np.einsum("bk,bk->b", codes, codes)[:, None]
    product = np.einsum("bk,bk->b", blocks, codes)[:, None]
    scale = (count * product - first * total) * _inverse(count * square - first * first)
    mins = (total - scale * first) / np.float32(count)
    rest = blocks - codes * scale - mins
    return scale, mins, np.einsum("bk,bk->b", rest, rest)[:, None]
