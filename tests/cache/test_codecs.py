"""Every codec: the same checks over all of them, and a row with what it must cost and how well it must restore."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from satchel import kernels
from satchel.cache.codecs import codec_names, find_codec


@dataclass(frozen=True)
class Row:
    """``bytes_64``: of a token at D = 64. ``error``: of normally distributed pairs, over their deviation, at most.

    The bounds are the best possible ones for a Gaussian (a Lloyd-Max quantizer: 0.0975 with 4 bits, 0.186 with 3, 0.343
    with 2) and 5 % more for even levels and for rounded scales; half a step of 8 bits over 4 deviations; a half's ulp.
    """

    bytes_64: float
    error: float
    mixed: bool = False


# One row per codec.
ROWS: dict[str, Row] = {
    "f16": Row(256, 2**-11),
    "q8": Row(132, 4 / 127 / 2),
    "q4": Row(68, 0.103),
    "q2": Row(36, 0.36),
    "grouped4": Row(72, 0.103),
    "grouped3": Row(56, 0.2),
    "grouped2": Row(40, 0.37),
    "kvquant4": Row(74, 0.0975),
    "kvquant3": Row(58, 0.186),
    "kvquant2": Row(42, 0.343),
    "mikv": Row(63, 0.37, mixed=True),
}


def test_every_codec_has_a_row() -> None:
    assert set(ROWS) == set(codec_names())


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("head_size", [16, 64, 80, 128, 256])
def test_declared_forms(name: str, head_size: int) -> None:
    codec, row = find_codec(name), ROWS[name]
    assert codec.name == name
    assert codec.paper
    assert codec.mixed == row.mixed
    assert 0 <= codec.high_blocks < codec.group_blocks
    low, high = codec.low(head_size), codec.high(head_size)
    assert (low != high) == row.mixed
    assert codec.calibrated == (name != "f16")
    sizes = [kernels.block_bytes(form, head_size) for form in (low, high)]
    assert all(size % 16 == 0 for size in sizes)
    assert sizes[0] <= 16 * codec.bytes_per_token(head_size) <= sizes[1]


@pytest.mark.parametrize("name", codec_names())
def test_bytes_per_token(name: str) -> None:
    assert find_codec(name).bytes_per_token(64) == ROWS[name].bytes_64


def test_mixed_precision_counts_both_forms() -> None:
    mixed, low, high = (find_codec(name).bytes_per_token(80) for name in ("mikv", "grouped2", "q8"))
    assert mixed == (3 * low + high) / 4


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("head_size", [64, 128])
def test_restored_pairs(name: str, head_size: int) -> None:
    """Channels of very different centers and spreads, as keys before RoPE have them."""
    rng = np.random.default_rng(3)
    spread = rng.uniform(0.1, 5.0, (2, 1, head_size))
    sample, pairs = (rng.normal(size=(2, tokens, head_size)) * spread for tokens in (512, 512))
    center = np.float64(0) if name == "f16" else rng.normal(size=(2, 1, head_size)) * 20
    keys, values = (pairs + center).astype(np.float32)
    for form in {find_codec(name).low(head_size), find_codec(name).high(head_size)}:
        statistics = kernels.calibrate(form, *(sample + center).astype(np.float32))
        blocks = kernels.encode_blocks(form, statistics, keys, values)
        restored_keys, restored_values = kernels.decode_blocks(form, statistics, head_size, blocks)
        restored = restored_keys.swapaxes(1, 2).reshape(keys.shape), restored_values.reshape(values.shape)
        for got, given, width in zip(restored, (keys, values), spread, strict=True):
            assert np.sqrt((((got - given) / width) ** 2).mean()) <= ROWS[name].error
