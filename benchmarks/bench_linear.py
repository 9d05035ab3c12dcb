"""The quantized linear layer, y [M, N] = x [M, K] times packed weights: a chunk, some rows, one row.

The default shapes are of qwen2.5-coder-0.5b (gate and up; down; query and output) and one of a larger model.
One and four rows (decoding) read their weights from memory, as a model does: copies of the matrix, together
larger than the CPU's caches, take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from measuring import Row, make_parser, median_seconds, report, sweep_variants
from satchel.export.blocks import BlockFormat, BlockTensor
from satchel.export.packing import pack
from satchel.kernels import _native

SHAPES = ("896x4864", "4864x896", "896x896", "2048x8192")  # K x N
FORMATS = {
    "4": BlockFormat(4, 32), "4+min": BlockFormat(4, 32, has_min=True), "5": BlockFormat(5, 32),
    "5+min": BlockFormat(5, 32, has_min=True), "6": BlockFormat(6, 16), "8": BlockFormat(8, 32),
}  # fmt: skip
COLD_BYTES = 160 << 20  # of copies that take turns
MANY_ROWS = 64  # from here on arithmetic decides, and one copy does


def packed_copies(form: BlockFormat, inputs: int, outputs: int, cold: bool) -> list[Any]:
    """Random weights in the packed layout, once or often enough to fill ``COLD_BYTES``."""
    rng = np.random.default_rng(1)
    highest = 256 if form.bits == 8 else 1 << form.bits
    codes = rng.integers(0, highest, (outputs, inputs), dtype=np.uint8)
    factors = rng.uniform(0.001, 0.01, (2, outputs, inputs // form.block)).astype(np.float32)
    tensor = BlockTensor(form, codes, factors[0], -factors[1] if form.has_min else None)
    first = np.frombuffer(pack(tensor), dtype=np.uint8)
    return [first, *(first.copy() for _ in range(COLD_BYTES // first.size if cold else 0))]


def run_layer(x: Any, turns: list[Any], outputs: int, form: BlockFormat, threads: int, take: int) -> None:
    """The layer once, over the copy whose turn it is."""
    packed = turns[take % len(turns)]
    _native.linear(x, packed, outputs, form.bits, form.block, form.has_min, 1.0, threads=threads)


def rows(given: Any) -> Iterator[Row]:
    for shape in given.shape or SHAPES:
        inputs, outputs = map(int, shape.split("x"))
        for bits in given.bits or FORMATS:
            form = FORMATS[bits]
            copies = packed_copies(form, inputs, outputs, cold=min(given.rows) < MANY_ROWS)
            for count in given.rows:
                x = np.random.default_rng(2).standard_normal((count, inputs)).astype(np.float32)
                turns = copies if count < MANY_ROWS else copies[:1]
                for variant in sweep_variants(given.variant):
                    call = partial(run_layer, x, turns, outputs, form, given.threads)
                    seconds = median_seconds(call, given.seconds)
                    moved = copies[0].size + 4 * count * (inputs + outputs)
                    case = {"KxN": shape, "bits": bits, "M": count, "simd": variant}
                    yield Row(case, seconds, 2.0 * count * inputs * outputs, moved)


def main() -> None:
    parser = make_parser("Quantized linear layer.")
    parser.add_argument("--shape", action="append", metavar="KxN", help=f"default: {', '.join(SHAPES)}")
    parser.add_argument("--bits", action="append", choices=list(FORMATS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 512], metavar="M")
    given = parser.parse_args()
    report("satchel linear", rows(given), given)


if __name__ == "__main__":
    main()
