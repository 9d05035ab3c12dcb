"""What a portable package and the engine that runs it agree on: names of the state, windows, where weights lie.

A matrix is three tensors one after the other, each aligned to ``ALIGN`` bytes: codes uint8 [rows, blocks, block *
bits / 8] (4 bits: two neighbours a byte, the first in the low half), scales float32 [rows, blocks], and, with
``has_min``, offsets float32 [rows, blocks]. w = scale * (code - 2^(bits - 1)) (+ offset).
"""

from __future__ import annotations

from dataclasses import dataclass

from .spec import ModelSpec

ALIGN = 64
STATE = ("key", "value", "queries")
OBSERVED = "observed.start"  # initializer: minus the number of queries that the state keeps, int64 [1]
OBSERVED_QUERIES = 128  # as exported: what the most demanding scorer wants


def state_name(when: str, layer: int, what: str) -> str:
    """Name of a state tensor: ``when`` is past or present, ``what`` one of ``STATE``.

    Keys (after RoPE) and values float [1, kv_heads, tokens, head_size]; queries (before RoPE) float32
    [n, heads x head_size], the last ones that were read.
    """
    return f"{when}.{layer}.{what}"


def windows_of(spec: ModelSpec) -> tuple[int, ...]:
    """Each layer's window, 0 where it sees everything: a window as long as the context is none."""
    return tuple(window if window < spec.context_length else 0 for window in spec.attention_windows)


@dataclass(frozen=True)
class MatrixParts:
    """(offset, bytes) of the tensors of a matrix that starts at ``offset``; ``offsets`` None: it has none."""

    codes: tuple[int, int]
    scales: tuple[int, int]
    offsets: tuple[int, int] | None

    @property
    def end(self) -> int:
        """Where the last one ends."""
        return sum(self.offsets or self.scales)


def matrix_parts(rows: int, columns: int, bits: int, block: int, has_offsets: bool, offset: int = 0) -> MatrixParts:
    """Where the tensors of a matrix are."""
    blocks = columns // block
    codes = (offset, rows * columns * bits // 8)
    scales = (_aligned(sum(codes)), rows * blocks * 4)
    offsets = (_aligned(sum(scales)), rows * blocks * 4) if has_offsets else None
    return MatrixParts(codes, scales, offsets)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN
