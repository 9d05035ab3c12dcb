"""Codecs: pairs into blocks (once per demoted token) and back into floats (at every recalled block).

One head's pairs in one thread. Decoding reads blocks from memory and writes floats that stay in the CPU's caches, as in
attention: its bytes are those of the blocks, and the column ``read only`` is what reading them costs at least, in GB/s.
Encoding reads floats and writes blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from measuring import Row, make_parser, median_seconds, report, sweep_variants
from satchel import kernels
from satchel.cache.codecs import codec_names, find_codec
from satchel.cache.lowrank import CSKV, LowRank, low_form

TAKES = 7
COLD_BYTES = 96 << 20  # of blocks to decode: beyond any CPU's caches
AT_ONCE = 64  # blocks of one call: its floats, 512 KB at D = 64, stay near


def read_seconds(blocks: Any) -> float:
    """The best of some takes of going once over all bytes, as 64-bit numbers."""
    words = blocks.reshape(-1).view(np.uint64)
    best = float("inf")
    for _ in range(TAKES):
        begun = time.perf_counter()
        words.max()
        best = min(best, time.perf_counter() - begun)
    return best


def decode(form: kernels.NativeCodec, statistics: kernels.HeadStatistics, head_size: int, parts: Any, _: int) -> None:
    for part in parts:
        kernels.decode_blocks(form, statistics, head_size, part)


def encode(form: kernels.NativeCodec, statistics: kernels.HeadStatistics, keys: Any, values: Any, _: int) -> None:
    kernels.encode_blocks(form, statistics, keys, values)


def random_basis(rng: np.random.Generator, head_size: int, ranks: tuple[int, int]) -> kernels.LowRankBasis:
    """Of one head; what its numbers are makes no difference to time."""
    turn = np.linalg.qr(rng.normal(size=(2 * head_size, 2 * head_size)))[0].astype(np.float32)[None, None]
    keys, values, rest = np.split(turn, [ranks[0], sum(ranks)], axis=-1)
    return kernels.LowRankBasis(
        key_encoders=keys, key_decoders=keys.swapaxes(2, 3), value_encoders=values,
        value_decoders=values.swapaxes(2, 3), rest_encoders=rest, rest_decoders=rest.swapaxes(2, 3),
    )  # fmt: skip


def rows(given: Any) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, given.tokens, given.head_size)).astype(np.float32)
    for name in given.codec or [name for name in codec_names() if not find_codec(name).mixed]:
        lowrank = LowRank(CSKV, given.rank) if given.rank else None
        form = low_form(find_codec(name), given.head_size, lowrank)
        basis = random_basis(rng, given.head_size, lowrank.ranks(given.head_size)) if lowrank else None
        statistics = kernels.calibrate(form, keys[: given.sample], values[: given.sample], basis)
        blocks = kernels.encode_blocks(form, statistics, keys, values)
        cold = np.tile(blocks, (COLD_BYTES // blocks.nbytes + 1, 1))
        parts = [cold[first : first + AT_ONCE] for first in range(0, len(cold), AT_ONCE)]
        only = f"{cold.nbytes / read_seconds(cold) / 1e9:.1f}"
        work = partial(encode, form, statistics, keys, values)
        case = {"codec": name, "way": "encode", "simd": "-", "read only": only}
        yield Row(case, median_seconds(work, given.seconds), 2.0 * keys.size, blocks.nbytes + 2 * keys.nbytes)
        for variant in sweep_variants(given.variant):
            work = partial(decode, form, statistics, given.head_size, parts)
            case = {"codec": name, "way": "decode", "simd": variant, "read only": only}
            numbers = 2.0 * len(cold) * kernels.BLOCK_TOKENS * given.head_size
            yield Row(case, median_seconds(work, given.seconds), numbers, cold.nbytes)


def main() -> None:
    parser = make_parser("Codecs. They run in one thread; --threads is for the ceiling.")
    parser.set_defaults(threads=1)
    parser.add_argument("--codec", action="append", choices=codec_names(), help="repeatable; default: all plain ones")
    parser.add_argument("--tokens", type=int, default=4096, help="of encoding; a multiple of 16 (default: %(default)s)")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--rank", type=int, metavar="PERCENT", help="of the channels; default: no low rank")
    parser.add_argument("--sample", type=int, default=512, help="tokens to calibrate from (default: %(default)s)")
    given = parser.parse_args()
    report("satchel codecs", rows(given), given)


if __name__ == "__main__":
    main()
