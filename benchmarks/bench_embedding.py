"""Rows of a packed embedding table as float32: what stands at the beginning of every chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from bench_linear import FORMATS, packed_copies
from measuring import Row, make_parser, median_seconds, report, sweep_variants
from satchel.kernels import _native

TURNS = 16  # other ids each time, so that rows come from memory


def rows(given: Any) -> Iterator[Row]:
    rng = np.random.default_rng(4)
    for bits in given.bits or ("6", "8"):
        form = FORMATS[bits]
        table = packed_copies(form, given.columns, given.vocabulary, cold=False)[0]
        for count in given.rows:
            ids = rng.integers(0, given.vocabulary, (TURNS, count), dtype=np.int64)
            for variant in sweep_variants(given.variant):

                def work(take: int, ids: Any = ids, table: Any = table, form: Any = form) -> None:
                    _native.embed(
                        ids[take % TURNS], table, given.vocabulary, given.columns,
                        form.bits, form.block, form.has_min, 1.0,
                    )  # fmt: skip

                seconds = median_seconds(work, given.seconds)
                row_bytes = table.size // given.vocabulary + 4 * given.columns  # codes read, floats written
                case = {"bits": bits, "ids": count, "simd": variant}
                yield Row(case, seconds, 1.0 * count * given.columns, count * row_bytes)


def main() -> None:
    parser = make_parser("Packed embedding. It runs in one thread; --threads is for the ceiling.")
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--columns", type=int, default=896)
    parser.add_argument("--bits", action="append", choices=list(FORMATS), help="default: 6 and 8")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512], metavar="IDS")
    given = parser.parse_args()
    report("satchel embed", rows(given), given)


if __name__ == "__main__":
    main()
