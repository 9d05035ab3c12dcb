"""What a percentage of the channels means, in ranks, forms and bytes, for every codec."""

from __future__ import annotations

import pytest
from satchel.cache import CacheSettings
from satchel.cache.codecs import codec_names, find_codec
from satchel.cache.lowrank import (
    CSKV,
    LOWRANKS,
    NO_LOWRANK,
    THINK,
    LowRank,
    bytes_per_token,
    high_form,
    low_form,
    rank_of,
)


@pytest.mark.parametrize(
    ("percent", "head_size", "rank"),
    [(50, 64, 32), (20, 64, 13), (20, 128, 26), (1, 64, 4), (100, 64, 64), (100, 80, 80), (25, 16, 4), (33, 256, 84)],
)
def test_rank_of(percent: int, head_size: int, rank: int) -> None:
    assert rank_of(percent, head_size) == rank


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("head_size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("percent", [1, 20, 50, 100])
def test_every_codec_takes_every_rank(name: str, head_size: int, percent: int) -> None:
    codec = find_codec(name)
    plain = bytes_per_token(codec, head_size)
    assert plain == codec.bytes_per_token(head_size)
    for lowrank in (LowRank(CSKV, percent), LowRank(THINK, percent)):
        low, high = low_form(codec, head_size, lowrank), high_form(codec, head_size, lowrank)
        assert (low.key_rank, low.value_rank) == (high.key_rank, high.value_rank) == lowrank.ranks(head_size)
        assert (low.key_bits, high.key_bits) == (codec.low(head_size).key_bits, codec.high(head_size).key_bits)
        found = bytes_per_token(codec, head_size, lowrank)
        assert found <= plain + 1  # blocks are rounded up to 16 bytes
        if percent == 100:
            assert found == plain


def test_bytes_at_64_channels() -> None:
    """Two scales of a half a token; 64 (26) numbers of a pair; for a block a half and 4 bits for each of the others; a
    block is rounded up to 16 bytes."""
    assert bytes_per_token(find_codec("f16"), 64, LowRank(CSKV, 50)) == 128 + 3
    assert bytes_per_token(find_codec("q8"), 64, LowRank(CSKV, 50)) == 4 + 64 + 3
    assert bytes_per_token(find_codec("q4"), 64, LowRank(CSKV, 50)) == 4 + 32 + 3
    assert bytes_per_token(find_codec("q4"), 64, LowRank(CSKV, 20)) == 4 + 13 + 4
    assert bytes_per_token(find_codec("q4"), 64, LowRank(THINK, 50)) == 4 + 16 + 32
    assert bytes_per_token(find_codec("f16"), 64, LowRank(CSKV, 20)) == 2 * 26 + 4


def test_settings() -> None:
    assert CacheSettings().low_rank is None
    assert CacheSettings(lowrank=CSKV).low_rank == LowRank(CSKV, 50)
    assert CacheSettings.parse({"lowrank": THINK, "rank": "20"}).low_rank == LowRank(THINK, 20)
    assert LOWRANKS[0] == NO_LOWRANK == CacheSettings().lowrank


def test_snapshots_tell_ranks_and_calibrations_apart() -> None:
    calibrated = [LowRank(CSKV, percent, sha256=sha256) for percent, sha256 in ((50, "a"), (50, "b"), (49, "a"))]
    forms = [*calibrated, LowRank(THINK, 50)]
    keys = [tuple(sorted(form.key.items())) for form in forms]
    assert len(set(keys)) == len(keys)
