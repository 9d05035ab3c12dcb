"""Predicted seconds: the counts against a slow loop, and the direction that each cost pushes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from satchel.devices.flash import Flash
from satchel.devices.planner import Plan
from satchel.devices.roofline import (
    Rates,
    Work,
    attended_pairs,
    choices,
    cold_blocks,
    estimated_rates,
    fetch_seconds,
    predict,
    repeated_pairs,
    voters,
    wanted_tokens,
)

FULL = Plan(10**9, 512, None, 4096, 10**8, ())
PRUNED = replace(FULL, chunk=100, hot_tokens=300, placement="pruned")
COLD = replace(
    FULL, chunk=128, hot_tokens=256, placement="cold", codec="q8", recall_tokens=256,
    recall_bytes=256 * 264,
    warm_bytes=1_622_016, cold_bytes=50_282_496, digest_bytes=1_671_168, archive_tokens=8_192,
)  # fmt: skip
WARM = replace(COLD, placement="warm", recall_bytes=0, warm_bytes=51_904_512, cold_bytes=0)
RATES = Rates(0.005, 4e-6, 0.035, 2e-6, True)
WORK = Work(0.7e9, 4e8, 86_016, 12_480, 48)
FLASH = Flash(1e9, 1e-4, 65536, True)


def seconds(plan: Plan, tokens: int, flash: Flash = FLASH, *, recall_every: int = 8) -> tuple[float, float]:
    found = predict(plan, tokens, RATES, WORK, flash, recall_every=recall_every)
    return found.read_seconds, found.decode_tokens_per_second


@pytest.mark.parametrize("plan", [FULL, PRUNED, COLD], ids=lambda plan: plan.placement)
@pytest.mark.parametrize("tokens", [1, 99, 100, 101, 513, 2_000])
def test_pairs_against_a_loop(plan: Plan, tokens: int) -> None:
    reach = {"full": 10**9, "pruned": 300, "cold": 256 + 32 + 256}[plan.placement]
    slow = sum(min(place - place % plan.chunk, reach) + place % plan.chunk + 1 for place in range(tokens))
    assert attended_pairs(plan, tokens) == pytest.approx(slow)


@pytest.mark.parametrize("plan", [FULL, PRUNED, COLD], ids=lambda plan: plan.placement)
@pytest.mark.parametrize("window", [1, 64, 200, 600])
@pytest.mark.parametrize("tokens", [1, 64, 65, 2_000])
def test_pairs_of_a_layer_with_a_window(plan: Plan, window: int, tokens: int) -> None:
    slow = sum(min(place + 1, window) for place in range(tokens))
    is_pruned = plan is PRUNED and window == 600  # a budget of 300
    assert attended_pairs(plan, tokens, window) == pytest.approx(attended_pairs(plan, tokens) if is_pruned else slow)


def test_layers_with_a_window_cost_little_at_any_length() -> None:
    windowed = replace(WORK, kv_heads=12, heads=4, windows=(100, 100, 50))
    pairs = [sum(min(place + 1, window) for place in range(1000)) for window in (1000, 100, 100, 50)]
    found = predict(FULL, 1000, RATES, windowed, FLASH, recall_every=8)
    assert found.read_seconds == pytest.approx(1000 * 0.005 + sum(pairs) / 4 * 4e-6)
    assert found.decode_tokens_per_second == pytest.approx(1 / (0.035 + (1000 + 250) / 4 * 2e-6))
    for plan in (WARM, COLD):
        less, more = (predict(plan, 9_000, RATES, work, FLASH, recall_every=8) for work in (windowed, WORK))
        assert less.read_seconds < more.read_seconds
        assert less.decode_tokens_per_second > more.decode_tokens_per_second


def test_reading_the_whole_is_counted_to_the_letter() -> None:
    read, decode = seconds(FULL, 1000)
    assert read == pytest.approx(1000 * 0.005 + 1000 * 1001 / 2 * 4e-6)
    assert decode == pytest.approx(1 / (0.035 + 1000 * 2e-6))


@pytest.mark.parametrize("tokens", [500, 2_048, 4_096])
def test_compiling_is_counted_against_a_loop(tokens: int) -> None:
    """Each token of a piece sees the text and its piece so far; half of that again for the pairs of the piece."""
    compiled = replace(FULL, hot_tokens=256, placement="compiled")
    piece = min(tokens, 2_048)
    slow = sum(tokens + (place % piece + 0.5) + 0.5 * piece for place in range(tokens))
    assert repeated_pairs(tokens) == pytest.approx(slow)
    assert repeated_pairs(tokens, 300) == 300 * tokens
    whole, found = seconds(FULL, tokens), seconds(compiled, tokens)
    assert found[0] == pytest.approx(whole[0] + tokens * 0.005 + slow * 4e-6)
    assert found[1] == pytest.approx(1 / (0.035 + 256 * 2e-6))
    assert attended_pairs(compiled, tokens) == attended_pairs(FULL, tokens)


def test_flash_costs_and_memory_does_not() -> None:
    assert fetch_seconds(WARM, WORK, FLASH, 256) == cold_blocks(WARM, WORK, 256) == 0
    assert fetch_seconds(COLD, WORK, FLASH, 0) == 0
    # 16 blocks of 48 heads, 2,112 bytes each: one unit and what it straddles
    share = COLD.cold_bytes / (COLD.cold_bytes + COLD.warm_bytes)
    assert cold_blocks(COLD, WORK, 256) == pytest.approx(768 * share)
    assert fetch_seconds(COLD, WORK, FLASH, 256) == pytest.approx(768 * share * (8192 / 1e9 + 1e-4 / 8))
    assert seconds(COLD, 8_000)[0] > seconds(WARM, 8_000)[0]
    assert seconds(COLD, 8_000)[1] < seconds(WARM, 8_000)[1]
    # one choice for 8 tokens: read from the disk once, then again out of the system's file cache
    blocks, choosing = cold_blocks(COLD, WORK, 256), (8_000 - 256) / 16 * 2e-6
    disk = fetch_seconds(COLD, WORK, FLASH, 256)
    expected = 0.035 + 544 * 2e-6 + (choosing + disk) / 8 + blocks * 2e-6 * 7 / 8
    assert 1 / seconds(COLD, 8_000)[1] == pytest.approx(expected)
    assert seconds(COLD, 8_000, recall_every=1)[1] < seconds(COLD, 8_000)[1] < seconds(COLD, 8_000, recall_every=32)[1]
    slow = replace(FLASH, latency_seconds=1e-2, bandwidth=1e7)
    assert seconds(COLD, 8_000, slow)[0] > 1.5 * seconds(COLD, 8_000)[0]


def test_what_the_file_cache_holds_is_not_read_from_the_disk() -> None:
    blocks, device = cold_blocks(COLD, WORK, 256), fetch_seconds(COLD, WORK, FLASH, 256)
    assert fetch_seconds(COLD, WORK, FLASH, 256, COLD.cold_bytes) == pytest.approx(blocks * 2e-6)
    half = fetch_seconds(COLD, WORK, FLASH, 256, COLD.cold_bytes // 2)
    assert half == pytest.approx((device + blocks * 2e-6) / 2)
    slow = replace(FLASH, latency_seconds=1e-2, bandwidth=1e8)
    found = [predict(COLD, 8_000, RATES, WORK, slow, recall_every=8, file_cache_bytes=room)
             for room in (0, COLD.cold_bytes, 10**12)]  # fmt: skip
    assert found[0].read_seconds > found[1].read_seconds == found[2].read_seconds
    assert found[0].decode_tokens_per_second < found[1].decode_tokens_per_second == found[2].decode_tokens_per_second
    assert fetch_seconds(WARM, WORK, FLASH, 256, 10**9) == 0


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 47, 48, 49, 64, 65, 80, 100, 512])
def test_choices_against_a_loop(chunk: int) -> None:
    """As the native code makes them: groups of neighbours, of a long chunk every fourth query has a vote."""
    each, stride = (64, 4) if chunk > 48 else (4, 1)
    groups = [range(first, min(first + each, chunk))[::stride] for first in range(0, chunk, each)]
    assert choices(chunk) == len(groups)
    assert voters(chunk) == sum(map(len, groups))


def test_what_choosing_adds() -> None:
    """Every voter looks at every digest, of an archive that is half full on the way; more choices want more blocks."""
    blind = replace(WARM, digest_bytes=0)
    archived = 8_000 - 256
    looked = archived / 128 * 32 * archived / 16 / 2
    assert seconds(WARM, 8_000)[0] - seconds(blind, 8_000)[0] == pytest.approx(looked * 4e-6)
    assert 256 < wanted_tokens(replace(COLD, chunk=128)) < wanted_tokens(replace(COLD, chunk=512)) < 1024
    assert wanted_tokens(replace(COLD, chunk=1)) == 256


def test_an_archive_pays_at_length() -> None:
    assert seconds(WARM, 100_000)[0] < seconds(FULL, 100_000)[0] / 5
    assert seconds(WARM, 100_000)[1] > seconds(FULL, 100_000)[1]


def test_estimates_are_within_reason() -> None:
    rates = estimated_rates(WORK, 2)
    assert not rates.is_measured
    assert rates.is_sound
    assert 50 < 1 / rates.prefill_seconds_per_token < 500  # measured: 187 (README)
    assert 10 < 1 / rates.decode_seconds_per_token < 100  # measured: 28
    assert estimated_rates(WORK, 4).prefill_seconds_per_token == rates.prefill_seconds_per_token / 2


@pytest.mark.parametrize("field", [name for name in Rates.__dataclass_fields__ if name != "is_measured"])
def test_unsound_rates_are_noticed(field: str) -> None:
    assert RATES.is_sound
    for value in (-1.0, float("nan"), float("inf")):
        assert not replace(RATES, **{field: value}).is_sound
