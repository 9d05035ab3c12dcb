"""The entropy coder once more, slow and obvious: same bytes as ``native/entropy.cc``, symbol by symbol.

Interleaved rANS (Duda, arXiv 1311.2540) of order 0: the code of a block is a few big numbers ("states") that symbols
are pushed into and popped from, a frequent symbol moving its state less than a rare one. ``docs/snapshot-format.md``
has the bytes.
"""

from __future__ import annotations

import struct
from collections import Counter

BLOCK_BYTES = 1 << 20
MAX_RATIO = 256
STATES = 8
FREQUENCY_BITS = 12
TOTAL = 1 << FREQUENCY_BITS
LOWEST = 1 << 16  # a state is at least this and fits into 32 bits
RAW, RANS, CONSTANT = 0, 1, 2


def encode(data: bytes, *, planes: int, block_bytes: int = BLOCK_BYTES) -> bytes:
    """The coded form of ``data``; ``planes`` is 2 for 16-bit values, whose low and high bytes are coded apart."""
    blocks = (data[first : first + block_bytes] for first in range(0, len(data), block_bytes))
    return b"".join(_encode_block(block, planes) for block in blocks)


def decode(coded: bytes, original_bytes: int, *, planes: int, block_bytes: int = BLOCK_BYTES) -> bytes:
    """The original of ``coded``. Raises ValueError when it is not what `encode` writes for that many bytes."""
    out, at = b"", 0
    while len(out) < original_bytes:
        length, stored = _unpack("<II", coded, at)
        body = _slice(coded, at + 8, stored)
        _require(length == min(block_bytes, original_bytes - len(out)), "a block has the wrong length")
        _require(8 + stored >= -(-length // MAX_RATIO), "a block is too small for what it claims to hold")
        out += _decode_block(body, length, planes)
        at += 8 + stored
    _require(at == len(coded), "bytes are left over")
    return out


def normalize(counts: Counter[int]) -> dict[int, int]:
    """Frequencies that sum to ``TOTAL``, at least 1 for what occurs; the remainder goes to the most frequent."""
    n = sum(counts.values())
    frequencies = {s: max(1, (counts[s] * TOTAL + n // 2) // n) for s in sorted(counts)}
    spare = TOTAL - sum(frequencies.values())
    if spare > 0:
        frequencies[_most(frequencies)] += spare
    for _ in range(-spare):
        frequencies[_most(frequencies)] -= 1
    return frequencies


def _most(frequencies: dict[int, int]) -> int:
    return max(frequencies, key=lambda s: (frequencies[s], -s))


def _encode_block(data: bytes, planes: int) -> bytes:
    body = b"".join(_encode_plane(data[first::planes]) for first in range(planes))
    body = body.ljust(max(0, -(-len(data) // MAX_RATIO) - 8), b"\0")
    return struct.pack("<II", len(data), len(body)) + body


def _encode_plane(data: bytes) -> bytes:
    mode, payload = RAW, data
    if len(data) > 1 and len(set(data)) == 1:
        mode, payload = CONSTANT, data[:1]
    elif len(data) > 1:
        coded = _encode_rans(data)
        if len(coded) < len(data):
            mode, payload = RANS, coded
    return struct.pack("<II", mode, len(payload)) + payload


def _encode_rans(data: bytes) -> bytes:
    frequencies = normalize(Counter(data))
    start, starts = 0, {}
    for symbol, frequency in frequencies.items():
        starts[symbol] = start
        start += frequency
    states, words = [LOWEST] * STATES, []
    for i in reversed(range(len(data))):
        frequency, state = frequencies[data[i]], states[i % STATES]
        if state >= frequency << 32 - FREQUENCY_BITS:
            words.append(state & 0xFFFF)
            state >>= 16
        states[i % STATES] = (state // frequency << FREQUENCY_BITS) + state % frequency + starts[data[i]]
    bitmap = sum(1 << symbol for symbol in frequencies).to_bytes(32, "little")
    table = struct.pack(f"<{len(frequencies)}H", *frequencies.values())
    return bitmap + table + struct.pack("<8I", *states) + struct.pack(f"<{len(words)}H", *reversed(words))


def _decode_block(body: bytes, length: int, planes: int) -> bytes:
    out, at = bytearray(length), 0
    for first in range(planes):
        mode, stored = _unpack("<II", body, at)
        count = len(range(first, length, planes))
        out[first::planes] = _decode_plane(mode, _slice(body, at + 8, stored), count)
        at += 8 + stored
    _require(not any(body[at:]), "padding is not zero")
    return bytes(out)


def _decode_plane(mode: int, payload: bytes, count: int) -> bytes:
    _require(mode in (RAW, RANS, CONSTANT), "a plane has an unknown mode")
    if mode == RANS:
        return _decode_rans(payload, count)
    _require(len(payload) == (count if mode == RAW else 1), "a plane has the wrong length")
    return payload if mode == RAW else payload * count


def _decode_rans(payload: bytes, count: int) -> bytes:
    bitmap = int.from_bytes(_slice(payload, 0, 32), "little")
    symbols = [s for s in range(256) if bitmap >> s & 1]
    frequencies = _unpack(f"<{len(symbols)}H", payload, 32)
    _require(all(0 < f < TOTAL for f in frequencies) and sum(frequencies) == TOTAL, "frequencies do not sum to 4096")
    slots = [(s, f, i) for s, f in zip(symbols, frequencies, strict=True) for i in range(f)]
    at = 32 + 2 * len(symbols)
    states = list(_unpack("<8I", payload, at))
    _require(min(states) >= LOWEST, "a state is too small")
    at += 4 * STATES
    out = bytearray(count)
    for i in range(count):
        state = states[i % STATES]
        out[i], frequency, offset = slots[state % TOTAL]
        state = frequency * (state >> FREQUENCY_BITS) + offset
        if state < LOWEST:
            state = state << 16 | _unpack("<H", payload, at)[0]
            at += 2
        states[i % STATES] = state
    _require(at == len(payload), "words are left over")
    _require(set(states) == {LOWEST}, "the last states are wrong")
    return bytes(out)


def _slice(data: bytes, at: int, length: int) -> bytes:
    _require(at + length <= len(data), "it is cut short")
    return data[at : at + length]


def _unpack(form: str, data: bytes, at: int) -> tuple[int, ...]:
    return struct.unpack(form, _slice(data, at, struct.calcsize(form)))


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"coded data is damaged: {what}")
