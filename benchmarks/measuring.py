"""What the benchmarks share: options, timing, and the table with each row's share of the ceiling."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ceiling import Ceiling, measure_ceiling
from satchel import kernels
from satchel.devices.machine import cores_usable, cpu_name

LEAST_TAKES = 5
COLUMNS = ("median", "GFLOP/s", "GB/s", "of ceiling")


@dataclass(frozen=True)
class Row:
    """One measurement. ``case`` names it; ``moved_bytes`` is what must come from or go to memory at least."""

    case: dict[str, Any]
    median_seconds: float
    flop: float
    moved_bytes: float


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the common options; a benchmark adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=cores_usable(), help="default: all cores")
    parser.add_argument("--variant", action="append", choices=kernels.variants(),
                        help="instruction sets to measure, repeatable (default: all of this machine)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each row (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def sweep_variants(given: list[str] | None) -> Iterator[str]:
    """Selects one instruction set after the other, and the fastest again at the end."""
    before = kernels.active_variant()
    try:
        for name in given or kernels.variants():
            kernels.select_variant(name)
            yield name
    finally:
        kernels.select_variant(before)


def median_seconds(
    work: Callable[[int], Any], seconds: float, *, after: Callable[[], Any] = lambda: None
) -> float:
    """The median time of ``work(take)``, after one take that does not count; ``after`` is not timed."""
    work(0)
    after()
    takes: list[float] = []
    end = time.perf_counter() + seconds
    while len(takes) < LEAST_TAKES or time.perf_counter() < end:
        begun = time.perf_counter()
        work(len(takes))
        takes.append(time.perf_counter() - begun)
        after()
    return statistics.median(takes)


def report(title: str, rows: Iterator[Row], given: Any) -> None:
    """Prints rows as they come, or all as JSON at the end."""
    ceiling = measure_ceiling(given.threads)
    found = []
    if not given.json:
        print(f"{title}\n{cpu_name()}, {given.threads} threads; "
              f"ceiling {ceiling.gflops:.0f} GFLOP/s (float32), "
              f"{ceiling.gigabytes_per_second:.1f} GB/s (copying)\n")
    for row in rows:
        found.append(_figures(row, ceiling))
        if given.json:
            print(".", end="", file=sys.stderr, flush=True)
            continue
        if len(found) == 1:
            print("  ".join([*(f"{name:>9}" for name in row.case), *(f"{name:>10}" for name in COLUMNS)]))
        print("  ".join([*(f"{value!s:>9}" for value in row.case.values()), *_cells(found[-1])]), flush=True)
    if given.json:
        print(file=sys.stderr)
        shown = {"threads": given.threads, "cpu": cpu_name(), "gflops": ceiling.gflops,
                 "gigabytes_per_second": ceiling.gigabytes_per_second}
        print(json.dumps({"benchmark": title, "ceiling": shown, "rows": found}, indent=1))


def _figures(row: Row, ceiling: Ceiling) -> dict[str, Any]:
    return {
        **row.case,
        "median_seconds": row.median_seconds,
        "gflops": row.flop / row.median_seconds / 1e9,
        "gigabytes_per_second": row.moved_bytes / row.median_seconds / 1e9,
        "share_of_ceiling": ceiling.best_seconds(row.flop, row.moved_bytes) / row.median_seconds,
    }


def _cells(figures: dict[str, Any]) -> list[str]:
    microseconds = figures["median_seconds"] * 1e6
    time_shown = f"{microseconds:.0f} us" if microseconds < 10_000 else f"{microseconds / 1000:.1f} ms"
    cells = (time_shown, f"{figures['gflops']:.1f}", f"{figures['gigabytes_per_second']:.1f}",
             f"{figures['share_of_ceiling']:.0%}")
    return [f"{cell:>10}" for cell in cells]
