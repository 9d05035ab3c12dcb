"""What this machine can do at best, measured: float32 arithmetic through NumPy's BLAS, and copying memory.

``measure_ceiling(threads)`` runs this file in a fresh process, because BLAS reads its thread count when it is
loaded. ``python benchmarks/ceiling.py --threads 2`` prints the two figures alone.

The kernels may pass the arithmetic ceiling: weights and activations in 8 and 16 bits are multiplied in
integer lanes, of which there are two to four for each float32 lane. And data that stays in the CPU's caches
passes the copying ceiling.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
GEMM_SIZE = 1536  # three matrices of 9 MB: large enough for full speed, small enough for a second
COPY_BYTES = 256 << 20  # well beyond any CPU's caches
TAKES = 7


@dataclass(frozen=True)
class Ceiling:
    """``gflops``: float32 matrix product. ``gigabytes_per_second``: copying, bytes read and bytes written."""

    threads: int
    gflops: float
    gigabytes_per_second: float

    def best_seconds(self, flop: float, moved_bytes: float) -> float:
        """The roofline: no float32 kernel with data from memory does it in less."""
        return max(flop / self.gflops, moved_bytes / self.gigabytes_per_second) / 1e9


def measure_ceiling(threads: int) -> Ceiling:
    """Both figures with that many threads; takes some seconds."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--threads", str(threads), "--json"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Ceiling(**json.loads(done.stdout))


def _best_seconds(work: Callable[[], Any]) -> float:
    """The shortest of some takes: a ceiling is what the machine can, not what it does in the mean."""
    best = float("inf")
    for _ in range(TAKES):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best


def _gemm_gflops() -> float:
    rng = np.random.default_rng(0)
    left, right = (rng.random((GEMM_SIZE, GEMM_SIZE), dtype=np.float32) for _ in range(2))
    out = np.empty_like(left)
    return 2 * GEMM_SIZE**3 / _best_seconds(lambda: np.matmul(left, right, out=out)) / 1e9


def _copy_gigabytes(threads: int) -> float:
    source = np.ones(COPY_BYTES, dtype=np.uint8)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # NumPy copies without the interpreter's lock
        seconds = _best_seconds(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))
    return 2 * COPY_BYTES / seconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure this machine's ceiling.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if any(os.environ.get(name) != str(given.threads) for name in THREAD_VARIABLES):
        ceiling = measure_ceiling(given.threads)
    else:
        ceiling = Ceiling(given.threads, _gemm_gflops(), _copy_gigabytes(given.threads))
    if given.json:
        print(json.dumps(asdict(ceiling)))
    else:
        print(f"{ceiling.threads} threads: {ceiling.gflops:.0f} GFLOP/s (float32 matrix product), "
              f"{ceiling.gigabytes_per_second:.1f} GB/s (copying)")


if __name__ == "__main__":
    main()
