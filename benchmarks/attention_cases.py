"""Filled caches for the two attention benchmarks."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from satchel.kernels import _native

FILL_CHUNK = 512
FILL_WINDOW = 16  # filling looks back no further, which makes it cheap
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
Inputs = tuple[Any, Any, Any, Any]  # q [T, H, D], k and v [T, K, D], positions [T]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model's shape; the defaults are of qwen2.5-coder-0.5b."""
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--storage", action="append", choices=list(ELEMENT_BYTES), help="default: both")


class Attention:
    """A native cache with ``tokens`` in every layer, and the arguments to attend to it."""

    def __init__(self, given: Any, storage: str, tokens: int, layers: int) -> None:
        self._given, self.layers, self.tokens = given, layers, tokens
        self._rng = np.random.default_rng(3)
        half = given.head_size // 2
        self._frequencies = (1e-4 ** (np.arange(half) / half)).astype(np.float32)
        self._cache = _native.KVCache(
            layers=layers, heads=given.heads, kv_heads=given.kv_heads, head_size=given.head_size,
            storage=storage, threads=given.threads,
        )  # fmt: skip
        for first in range(0, tokens, FILL_CHUNK):
            chunk = self.inputs(min(FILL_CHUNK, tokens - first), first)
            for layer in range(layers):
                self.attend(layer, chunk, window=FILL_WINDOW)
            self._cache.commit()

    def inputs(self, count: int, first: int) -> Inputs:
        """Random ones of ``count`` tokens."""
        shapes = ((count, heads, self._given.head_size)
                  for heads in (self._given.heads, self._given.kv_heads, self._given.kv_heads))
        q, k, v = (self._rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        return q, k, v, np.arange(first, first + count, dtype=np.int64)

    def attend(self, layer: int, inputs: Inputs, window: int = 0) -> None:
        self._cache.attend(
            layer, *inputs, self._frequencies, scale=self._given.head_size**-0.5, window=window,
            threads=self._given.threads,
        )  # fmt: skip

    def undo(self) -> None:
        """Forgets what was appended since it was filled."""
        self._cache.rollback()

    def close(self) -> None:
        self._cache.close()
