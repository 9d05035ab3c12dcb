"""From a memory limit to a plan: inside the limit, as large as may be; an error names a limit that works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from satchel.devices.planner import CHUNKS, MARGIN_BYTES, MARGIN_SHARE, Costs, Plan, Wishes, make_plan
from satchel.devices.sizes import parse_size
from satchel.errors import MemoryLimitError

MB = 1 << 20
# qwen2.5-coder-0.5b: 24 layers with 2 KV heads of 64, bf16 pages of 64 tokens
COSTS = Costs(
    process_bytes=150 * MB, weight_bytes=630 * MB, scratch_bytes_per_chunk_token=135_000, page_tokens=64,
    kv_bytes_per_page=48 * 16_640, observed_bytes=3 * MB,
)  # fmt: skip
LEAST = 320
LIMITS = [round(700 * MB * 1.05**step) for step in range(0, 50)]
SETTINGS: list[dict[str, Any]] = [
    {}, {"hot_tokens": 2048}, {"hot_tokens": 2000}, {"hot_tokens": LEAST}, {"chunk": 512}, {"chunk": 1},
    {"chunk": 100}, {"chunk": 64, "hot_tokens": 700}, {"chunk": 512, "hot_tokens": 2048}, {"keep_everything": True},
    {"keep_everything": True, "chunk": 300},
]  # fmt: skip


def planned(limit: int, tokens: int, costs: Costs = COSTS, **settings: Any) -> Plan:
    """``settings``: what a person may wish, beside the other arguments of `make_plan`."""
    wishes = {key: settings.pop(key) for key in [*settings] if key in Wishes.__dataclass_fields__}
    return make_plan(costs, limit, tokens=tokens, least_hot_tokens=LEAST, wishes=Wishes(**wishes), **settings)


def plan(limit: int, tokens: int = 30_000, costs: Costs = COSTS, **settings: Any) -> Plan | None:
    try:
        return planned(limit, tokens, costs, **settings)
    except MemoryLimitError:
        return None


def smallest(tokens: int, costs: Costs = COSTS, **settings: Any) -> int:
    with pytest.raises(MemoryLimitError) as caught:
        planned(1, tokens, costs, **settings)
    return caught.value.smallest_bytes


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tokens", [1, 300, 2_049, 6_000, 30_000, 200_000])
def test_plans_over_a_sweep_of_limits(settings: dict[str, Any], tokens: int) -> None:
    found = [plan(limit, tokens, **settings) for limit in LIMITS]
    for limit, each in zip(LIMITS, found, strict=True):
        if each is None:
            continue
        assert each.limit_bytes == limit
        assert each.total_bytes <= limit * (1 - MARGIN_SHARE) - MARGIN_BYTES
        assert each.kv_limit_bytes == dict(each.rows)["KV cache"] == COSTS.kv_bytes(each.capacity_tokens + each.chunk)
        assert each.chunk == settings.get("chunk", each.chunk)
        if each.hot_tokens is None:
            assert each.capacity_tokens >= tokens
        else:
            assert each.hot_tokens == settings.get("hot_tokens", each.hot_tokens)
            assert each.hot_tokens >= LEAST
            assert each.capacity_tokens == each.hot_tokens + each.chunk  # room for the chunk that is being read
            assert not settings.get("keep_everything")
    possible = [each is not None for each in found]
    assert possible == sorted(possible)  # a larger limit never takes a plan away
    assert possible[-1] or tokens > 30_000
    plans = [each for each in found if each]
    kept = [each.hot_tokens is None for each in plans]
    assert kept == sorted(kept)
    if "chunk" in settings and "hot_tokens" not in settings:
        held = [each.capacity_tokens for each in plans]
        assert held == sorted(held)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 300, 383, 384, 385, 2_001, 2_048, 2_049, 2_100, 2_113, 6_000, 30_000])
def test_the_smallest_limit_works_and_less_does_not(settings: dict[str, Any], tokens: int) -> None:
    limit = smallest(tokens, **settings)
    assert plan(limit, tokens, **settings), "the limit that the error names is too small"
    # the margin is a share, rounded to bytes: a few of them lie between the two
    assert plan(limit - 4, tokens, **settings) is None, "a smaller limit would do"


@pytest.mark.parametrize("tokens", [300, 6_000, 30_000])
def test_the_error_names_the_limit_and_a_remedy(tokens: int) -> None:
    for settings, remedy in (
        ({}, "take a smaller model"), ({"hot_tokens": 2048}, "lower --kv hot_tokens"),
        ({"keep_everything": True}, "leave out --policy full"),
    ):  # fmt: skip
        with pytest.raises(MemoryLimitError) as caught:
            planned(500 * MB, tokens, **settings)  # type: ignore[arg-type]
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith("524MB of memory is too little for ")
        assert f"{tokens:,} tokens" in message
        assert remedy in message
        named = parse_size(message.split(": ")[1].split(" would do")[0])
        assert named >= caught.value.smallest_bytes
        assert plan(named, tokens, **settings)


@pytest.mark.parametrize("tokens", [1, 300, 2_000, 6_000, 30_000])
def test_the_whole_cache_stays_when_it_fits(tokens: int) -> None:
    """With some chunk: a smaller one is slower, but pruning what could stay costs answers."""
    for limit in LIMITS:
        whole = [plan(limit, tokens, chunk=chunk, keep_everything=True) for chunk in CHUNKS]
        found = plan(limit, tokens)
        if any(whole):
            assert found is not None
            assert found.hot_tokens is None, f"{tokens} tokens fit whole into {limit} bytes, kept {found.hot_tokens}"


def test_a_budget_holds_for_the_turns_after_a_short_text_too() -> None:
    found = plan(LIMITS[-1], 500, hot_tokens=2_048)
    assert found is not None
    assert (found.hot_tokens, found.capacity_tokens) == (2_048, 2_048 + found.chunk)


@pytest.mark.parametrize(("longest", "capacity"), [(0, 2_000), (1_000, 2_000), (32_768, 32_768)])
def test_a_whole_cache_has_room_to_grow(longest: int, capacity: int) -> None:
    found = plan(LIMITS[-1], 2_000, longest_tokens=longest)
    assert found is not None
    assert (found.hot_tokens, found.capacity_tokens) == (None, capacity)


def test_scoring_needs_room_unless_everything_is_kept() -> None:
    costs = replace(COSTS, scoring_bytes_per_token=2_000)
    assert smallest(30_000, costs) > smallest(30_000) + 2_000 * LEAST
    assert smallest(30_000, costs, keep_everything=True) == smallest(30_000, keep_everything=True)


@pytest.mark.parametrize("field", ["process_bytes", "weight_bytes", "observed_bytes"])
def test_every_cost_counts(field: str) -> None:
    more = replace(COSTS, **{field: getattr(COSTS, field) + 10 * MB})
    assert smallest(30_000, more) - smallest(30_000) == pytest.approx(10 * MB / (1 - MARGIN_SHARE), abs=2)


def test_pages_are_counted_whole() -> None:
    page = COSTS.kv_bytes_per_page
    assert [COSTS.kv_bytes(tokens) for tokens in (0, 1, 64, 65)] == [0, page, page, 2 * page]


def test_a_large_limit_takes_the_fastest_chunk() -> None:
    found = plan(10_000 * MB)
    assert found is not None
    assert (found.chunk, found.hot_tokens) == (max(CHUNKS), None)


@pytest.mark.parametrize("limit", [0, 1, -5, 100 * MB, 1 << 62])
def test_extreme_limits(limit: int) -> None:
    found = plan(limit)
    assert (found is not None) == (limit == 1 << 62)
