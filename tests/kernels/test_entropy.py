"""The entropy coder: exact, the same bytes as its twin, and harmless whatever it is given."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from satchel.kernels import ENTROPY_BLOCK_BYTES, ENTROPY_MAX_RATIO, entropy_decode, entropy_encode
from satchel.kernels import reference_entropy as twin


def bfloat16(count: int, seed: int) -> bytes:
    values = np.random.default_rng(seed).normal(0, 1, count).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def skewed(count: int, seed: int) -> bytes:
    return np.random.default_rng(seed).geometric(0.3, count).clip(0, 255).astype(np.uint8).tobytes()


SAMPLES = {
    "empty": b"", "one": b"\xff", "two": b"\0\xff", "constant": b"\x07" * 3000, "all": bytes(range(256)) * 20,
    "random": np.random.default_rng(1).bytes(5000), "skewed": skewed(5000, 2), "bfloat16": bfloat16(2500, 3),
    "odd": bfloat16(2500, 4)[:-1], "rare": b"\0" * 4000 + b"\1" + b"\0" * 4000, "text": b"to and fro, " * 300,
    "two symbols": skewed(3000, 5).translate(bytes(b & 1 for b in range(256))),
}  # fmt: skip


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", SAMPLES)
def test_same_bytes_as_the_twin_and_back(name: str, planes: int) -> None:
    data = SAMPLES[name]
    coded = entropy_encode(data, planes=planes)
    assert coded == twin.encode(data, planes=planes)
    assert entropy_decode(coded, len(data), planes=planes).tobytes() == data
    assert twin.decode(coded, len(data), planes=planes) == data


@pytest.mark.parametrize("count", [*range(18), 31, 32, 33])
def test_every_remainder(count: int) -> None:
    for planes in (1, 2):
        data = skewed(count, count)
        coded = entropy_encode(data, planes=planes)
        assert coded == twin.encode(data, planes=planes)
        assert entropy_decode(coded, count, planes=planes).tobytes() == data


def test_it_is_near_the_entropy() -> None:
    data = skewed(200_000, 6)
    share = np.bincount(np.frombuffer(data, np.uint8)) / len(data)
    bits = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert len(entropy_encode(data, planes=1)) < 1.01 * len(data) * bits / 8 + 600


def test_bfloat16_gets_smaller_and_noise_hardly_grows() -> None:
    assert len(entropy_encode(bfloat16(100_000, 7), planes=2)) < 0.75 * 200_000
    assert len(entropy_encode(SAMPLES["random"], planes=1)) == 5000 + 16


@pytest.mark.parametrize("planes", [1, 2])
def test_blocks_do_not_depend_on_each_other_or_on_threads(planes: int) -> None:
    data = skewed(2 * ENTROPY_BLOCK_BYTES + 777, 8)
    blocks = [data[i : i + ENTROPY_BLOCK_BYTES] for i in range(0, len(data), ENTROPY_BLOCK_BYTES)]
    coded = entropy_encode(data, planes=planes, threads=3)
    assert coded == b"".join(entropy_encode(block, planes=planes) for block in blocks)
    for threads in (1, 3):
        assert entropy_decode(coded, len(data), planes=planes, threads=threads).tobytes() == data


def test_a_constant_block_is_not_smaller_than_the_ratio_allows() -> None:
    data = bytes(ENTROPY_BLOCK_BYTES)
    coded = entropy_encode(data, planes=1)
    assert len(coded) == ENTROPY_BLOCK_BYTES // ENTROPY_MAX_RATIO
    assert entropy_decode(coded, len(data), planes=1).tobytes() == data


# ------------------------------------------------------------------------------------------------- hostile input


def rans_block(frequencies: dict[int, int], states: list[int], words: bytes, count: int) -> bytes:
    bitmap = sum(1 << s for s in frequencies).to_bytes(32, "little")
    payload = bitmap + struct.pack(f"<{len(frequencies)}H", *frequencies.values())
    payload += struct.pack(f"<{len(states)}I", *states) + words
    plane = struct.pack("<II", 1, len(payload)) + payload
    return struct.pack("<II", count, len(plane)) + plane


LOW = 1 << 16
HOSTILE = {
    "cut header": (b"\1\0\0", 1, "a block is cut short"),
    "no block": (b"", 1, "cut short"),
    "left over": (entropy_encode(b"abc", planes=1) + b"\0", 3, "left over"),
    "wrong length": (entropy_encode(b"abc", planes=1), 4, "wrong length"),
    "length beyond": (struct.pack("<II", 3, 0xFFFFFFFF) + b"abc", 3, "cut short"),
    "unknown mode": (struct.pack("<IIII", 3, 11, 3, 3) + b"abc", 3, "unknown mode"),
    "raw too short": (struct.pack("<IIII", 3, 10, 0, 2) + b"ab", 3, "wrong length"),
    "constant too long": (struct.pack("<IIII", 3, 10, 2, 2) + b"ab", 3, "wrong length"),
    "plane beyond": (struct.pack("<IIII", 3, 11, 0, 0xFFFFFFFF) + b"abc", 3, "cut short"),
    "dirty padding": (struct.pack("<IIII", 3, 12, 0, 3) + b"abc\1", 3, "padding is not zero"),
    "bomb": (struct.pack("<IIII", 1 << 20, 9, 2, 1) + b"a", 1 << 20, "too small for what it claims"),
    "no symbols": (rans_block({}, [LOW] * 8, b"", 3), 3, "do not sum to 4096"),
    "sum too small": (rans_block({1: 1, 2: 4094}, [LOW] * 8, b"", 3), 3, "do not sum to 4096"),
    "sum too large": (rans_block({1: 2, 2: 4095}, [LOW] * 8, b"", 3), 3, "do not sum to 4096"),
    "zero frequency": (rans_block({1: 0, 2: 4095, 3: 1}, [LOW] * 8, b"", 3), 3, "do not sum to 4096"),
    "huge frequency": (rans_block({1: 1, 2: 65535}, [LOW] * 8, b"", 3), 3, "do not sum to 4096"),
    "small state": (rans_block({1: 1, 2: 4095}, [LOW - 1] * 8, b"", 3), 3, "a state is too small"),
    "wrong end": (rans_block({1: 1, 2: 4095}, [LOW + 5] * 8, b"", 3), 3, "the last states are wrong|cut short"),
    "words left": (rans_block({1: 2048, 2: 2048}, [LOW] * 8, b"ab" * 900, 3), 3, "left over|wrong"),
    "states cut": (rans_block({1: 1, 2: 4095}, [LOW] * 7, b"", 3), 3, "cut short"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str) -> None:
    coded, length, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message):
        entropy_decode(coded, length, planes=1)
    with pytest.raises(ValueError, match="damaged"):
        twin.decode(coded, length, planes=1)


def test_a_length_that_no_memory_could_hold() -> None:
    for length in (1 << 40, (1 << 64) - 1):
        with pytest.raises(ValueError, match="too small for what it claims"):
            entropy_decode(b"\0" * 100, length, planes=1)
    with pytest.raises(ValueError, match="planes must be 1 or 2"):
        entropy_encode(b"a", planes=3)
    with pytest.raises(ValueError, match="not contiguous"):
        entropy_encode(np.zeros((4, 4), np.uint8)[:, ::2], planes=1)


@pytest.mark.parametrize("planes", [1, 2])
def test_mutations_are_refused_or_decode_as_in_the_twin(planes: int) -> None:
    rng = np.random.default_rng(9)
    data = bfloat16(150, 10)
    coded = entropy_encode(data, planes=planes)
    refused = 0
    for _ in range(400):
        mutant = bytearray(coded)
        for at in rng.integers(0, len(mutant), rng.integers(1, 4)):
            mutant[at] = rng.integers(0, 256)
        if rng.random() < 0.2:
            mutant = mutant[: rng.integers(0, len(mutant))]
        try:
            native: bytes | None = entropy_decode(bytes(mutant), len(data), planes=planes).tobytes()
        except ValueError:
            native = None
            refused += 1
        try:
            expected: bytes | None = twin.decode(bytes(mutant), len(data), planes=planes)
        except ValueError:
            expected = None
        assert native == expected
    assert refused > 100
