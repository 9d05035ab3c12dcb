"""From a memory limit to a plan: inside the limit, as large as may be; an error names a limit that works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from satchel.devices.planner import (
    CHUNKS,
    MARGIN_BYTES,
    MARGIN_SHARE,
    WHOLE_TOKENS,
    ArchiveCost,
    Costs,
    Plan,
    WindowCost,
    Wishes,
    compiled_plan,
    make_plan,
    why,
)
from satchel.devices.sizes import format_size, parse_size
from satchel.errors import MemoryLimitError

MB = 1 << 20
# qwen2.5-coder-0.5b: 24 layers with 2 KV heads of 64, bf16 pages of 64 tokens
COSTS = Costs(
    process_bytes=150 * MB, weight_bytes=630 * MB, scratch_bytes_per_chunk_token=135_000, page_tokens=64,
    kv_bytes_per_page=48 * 16_640, observed_bytes=3 * MB, heads=24,
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


# --- With an archive --------------------------------------------------------------------------------------------

KV_HEADS = 48  # layers times KV heads
ARCHIVE_COSTS = replace(
    COSTS, heads=KV_HEADS,
    archive=tuple(ArchiveCost(name, KV_HEADS * size, "landmark", KV_HEADS * 68 / 16) for name, size in
                  (("q8", 132), ("q4", 68), ("kvquant3", 60), ("q2", 36))),
)  # fmt: skip
GB = 1000**3
RANKS = {"full": 0, "warm": 1, "mixed": 2, "cold": 2}  # a part in memory more or less: the same answers
CODEC_RANKS = {None: 0, "q8": 1, "q4": 2, "kvquant3": 3, "q2": 4}
ARCHIVE_SETTINGS: list[dict[str, Any]] = [
    {}, {"hot_tokens": 2048}, {"chunk": 512}, {"chunk": 100}, {"window": 300, "sinks": 4}, {"recall_tokens": 0},
    {"recall_tokens": 256}, {"budget_bytes": 12_500_000}, {"budget_bytes": 60_000_000}, {"window": 40},
]  # fmt: skip


def archived(limit: int, tokens: int = 30_000, disk_bytes: int = 10 * GB, **settings: Any) -> Plan | None:
    return plan(limit, tokens, settings.pop("costs", ARCHIVE_COSTS), archive=True, disk_bytes=disk_bytes, **settings)


@pytest.mark.parametrize(
    ("limit", "tokens", "disk_bytes", "wishes", "placement", "codec"),
    [
        (2 * GB, WHOLE_TOKENS, 10 * GB, {}, "full", None),
        (2 * GB, WHOLE_TOKENS, 0, {}, "full", None),
        (8 * GB, WHOLE_TOKENS + 1, 10 * GB, {}, "warm", "q8"),
        (2 * GB, 30_000, 0, {}, "warm", "q8"),
        (1 * GB, 128_000, 10 * GB, {}, "mixed", "q8"),
        (2 * GB, 10_000, 10 * GB, {"budget_bytes": 90_000_000}, "warm", "q8"),
        (880_000_000, 30_000, 10 * GB, {}, "cold", "q8"),
        (900_000_000, 30_000, 10 * GB, {}, "mixed", "q8"),
        (1 * GB, 30_000, 0, {}, "warm", "q4"),
        (940_000_000, 30_000, 0, {}, "warm", "q2"),
        (1 * GB, 30_000, 120_000_000, {}, "mixed", "q8"),
        (900_000_000, 30_000, 120_000_000, {}, "mixed", "q4"),
        (8 * GB, 8_192, 10 * GB, {"budget_bytes": 12_500_000}, "cold", "q8"),
        (8 * GB, 8_192, 0, {"budget_bytes": 30_000_000}, "warm", "kvquant3"),
        (8 * GB, 200, 10 * GB, {"budget_bytes": 12_500_000}, "full", None),
    ],
)  # fmt: skip
def test_placements(
    limit: int, tokens: int, disk_bytes: int, wishes: dict[str, Any], placement: str, codec: str | None
) -> None:
    found = archived(limit, tokens, disk_bytes, **wishes)
    assert found is not None
    assert (found.placement, found.codec) == (placement, codec)
    assert found.cold_bytes <= disk_bytes
    assert bool(found.cold_bytes) == (placement in ("mixed", "cold"))


DIGESTS = replace(ARCHIVE_COSTS, archive=tuple(
    ArchiveCost("q8", KV_HEADS * 132, name, KV_HEADS * size) for name, size in (("channels", 14), ("landmark", 4.25))
))  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "retriever", "window", "chunk"),
    [
        (7_900_000, "channels", 169, 64), (6_000_000, "landmark", 226, 64), (4_700_000, "landmark", 112, 64),
        (3_900_000, "landmark", 80, 32), (3_400_000, None, 0, 0),
    ],
)  # fmt: skip
def test_smaller_digests_and_then_a_smaller_window(budget: int, retriever: str | None, window: int, chunk: int) -> None:
    found = archived(8 * GB, 5_120, costs=DIGESTS, budget_bytes=budget)
    if retriever is None:
        assert found is None
        return
    assert found is not None
    assert (found.retriever, found.window, found.chunk, found.codec) == (retriever, window, chunk, "q8")
    assert found.kv_ram_bytes <= budget


def test_the_last_resort_is_for_those_who_leave_it_open() -> None:
    for wishes in ({"window": 112}, {"chunk": 64}, {"hot_tokens": 128}):
        assert archived(8 * GB, 5_120, costs=DIGESTS, budget_bytes=3_900_000, **wishes) is None


@pytest.mark.parametrize("settings", ARCHIVE_SETTINGS, ids=str)
@pytest.mark.parametrize("disk_bytes", [0, 1_700_000, 150_000_000, 10 * GB])
@pytest.mark.parametrize("tokens", [1, 700, 8_192, 30_000, 128_000])
def test_archives_over_a_sweep_of_limits(settings: dict[str, Any], disk_bytes: int, tokens: int) -> None:
    ranks = []
    for limit in LIMITS:
        found = archived(limit, tokens, disk_bytes, **settings)
        if found is None:
            ranks.append((9, 0))
            continue
        ranks.append((CODEC_RANKS[found.codec], RANKS[found.placement]))
        rows = dict(found.rows)
        assert found.total_bytes <= limit * (1 - MARGIN_SHARE) - MARGIN_BYTES
        assert found.kv_ram_bytes <= settings.get("budget_bytes", limit)
        assert found.cold_bytes <= disk_bytes
        assert found.chunk == settings.get("chunk", found.chunk)
        if found.codec is None:
            assert found.capacity_tokens >= tokens
            continue
        assert found.hot_tokens is not None
        assert found.sinks is not None
        assert found.window is not None
        assert found.hot_tokens == settings.get("hot_tokens", found.sinks + found.window)
        assert found.sinks == settings.get("sinks", found.sinks)
        assert found.window == settings.get("window", found.window)
        assert found.recall_tokens == settings.get("recall_tokens", found.recall_tokens)
        assert found.capacity_tokens == found.hot_tokens + 63 + found.chunk
        assert found.archive_tokens + found.hot_tokens >= tokens
        assert found.warm_bytes == rows[f"archive in RAM ({found.codec})"]
        per_token = next(cost.bytes_per_token for cost in ARCHIVE_COSTS.archive if cost.codec == found.codec)
        assert found.warm_bytes + found.cold_bytes == found.archive_tokens * per_token
        recalled = min(found.recall_tokens, 1024)  # of one KV head on each thread
        assert found.recall_bytes == (recalled * per_token / KV_HEADS if found.cold_bytes else 0)
        assert found.digest_bytes == found.archive_tokens * 204
    assert ranks == sorted(ranks, reverse=True), "more memory has made the placement worse"


@pytest.mark.parametrize("settings", ARCHIVE_SETTINGS, ids=str)
@pytest.mark.parametrize("disk_bytes", [0, 1_700_000, 150_000_000, 10 * GB])
@pytest.mark.parametrize("tokens", [1, 300, 700, 8_192, 30_000])
def test_the_smallest_limit_of_an_archive_works_and_less_does_not(
    settings: dict[str, Any], disk_bytes: int, tokens: int
) -> None:
    more = {key: value for key, value in settings.items() if key != "budget_bytes"}
    limit = smallest(tokens, ARCHIVE_COSTS, archive=True, disk_bytes=disk_bytes, **more)
    assert archived(limit, tokens, disk_bytes, **more)
    assert archived(limit - 4, tokens, disk_bytes, **more) is None


@pytest.mark.parametrize(("disk_bytes", "tokens"), [(0, 30_000), (10 * GB, 30_000), (10 * GB, 8_192)])
def test_a_budget_that_is_too_small_is_named(disk_bytes: int, tokens: int) -> None:
    with pytest.raises(MemoryLimitError, match=r"^kv budget_bytes=4MB is too little for .* would do; raise") as caught:
        planned(8 * GB, tokens, ARCHIVE_COSTS, archive=True, disk_bytes=disk_bytes, budget_bytes=4_000_000)
    least = caught.value.smallest_bytes
    assert archived(8 * GB, tokens, disk_bytes, budget_bytes=least)
    assert archived(8 * GB, tokens, disk_bytes, budget_bytes=least - 1) is None
    with pytest.raises(MemoryLimitError, match=r"of memory is .* would do \(with kv budget_bytes=") as both:
        planned(1, tokens, ARCHIVE_COSTS, archive=True, disk_bytes=disk_bytes, budget_bytes=4_000_000)
    named = parse_size(str(both.value).split("budget_bytes=")[1].split(")")[0])
    assert archived(both.value.smallest_bytes, tokens, disk_bytes, budget_bytes=named)


def test_the_hot_tier_shrinks_with_the_budget() -> None:
    found = [archived(8 * GB, 30_000, budget_bytes=size) for size in range(10_500_000, 60_000_000, 100_000)]
    plans = [each for each in found if each and each.codec == "q8"]
    assert len(plans) > 450
    shapes = [(each.chunk, each.sinks, each.window, each.recall_tokens) for each in plans]
    assert shapes[-1] == (512, 64, 1024, 4096)
    assert shapes[0][2] is not None
    assert shapes[0][2] < 200
    assert len(set(shapes)) >= 6
    for column in range(1, 4):
        values = [shape[column] for shape in shapes]
        assert values == sorted(values)  # type: ignore[type-var]
    for window in {each.window or 0 for each in plans}:  # half of a chunk before less of a window
        chunks = [each.chunk for each in plans if each.window == window]
        assert chunks == sorted(chunks)
        assert all(chunk <= window for chunk in chunks)


def test_recall_costs_nothing_while_the_archive_is_in_memory() -> None:
    found = archived(8 * GB, 8_192, budget_bytes=72_000_000)
    assert found is not None
    assert (found.placement, found.recall_tokens, found.recall_bytes) == ("warm", 4096, 0)


def test_what_is_recalled_from_disk_is_held_for_one_layer() -> None:
    found = archived(8 * GB, 100_000, budget_bytes=60_000_000)
    assert found is not None
    assert found.recall_bytes == 1024 * 132


def test_a_fork_has_room_beside_what_it_was_forked_from() -> None:
    """Both hold a window of their own in the end; the budget bounds one of them, the limit of the process both."""
    for budget in (12_500_000, 20_000_000, 60_000_000):
        found = archived(8 * GB, 30_000, budget_bytes=budget)
        assert found is not None
        assert found.sinks is not None
        assert found.hot_tokens is not None
        before = COSTS.pages(found.hot_tokens - found.sinks + 63)
        pages = before + COSTS.pages(found.capacity_tokens) + 1  # one is copied when the fork begins inside of it
        assert found.kv_limit_bytes + found.fork_bytes >= pages * COSTS.kv_bytes_per_page
        assert found.kv_ram_bytes <= budget
        assert found.total_bytes >= found.kv_ram_bytes + found.fork_bytes + COSTS.weight_bytes


def test_an_archive_has_room_to_grow() -> None:
    for size, placement in ((90_000_000, "warm"), (40_000_000, "mixed")):
        short = archived(8 * GB, 8_192, budget_bytes=size)
        long = archived(8 * GB, 8_192, budget_bytes=size, longest_tokens=32_768)
        assert short is not None
        assert long is not None
        assert short.placement == long.placement == placement
        assert short.archive_tokens < long.archive_tokens
        assert long.kv_ram_bytes <= size


def test_a_budget_bounds_what_forgets_too() -> None:
    found = plan(8 * GB, 30_000, budget_bytes=30_000_000)
    assert found is not None
    assert found.placement == "pruned"
    assert 30_000_000 - 2 * COSTS.kv_bytes_per_page < found.kv_limit_bytes <= 30_000_000


def compiled(limit: int, tokens: int, costs: Costs = COSTS, **wishes: Any) -> Plan | None:
    after = planned(8 * GB, 30_000, costs, **{"hot_tokens": 512, **wishes})
    try:
        return compiled_plan(costs, limit, tokens=tokens, wishes=Wishes(**wishes), after=after)
    except MemoryLimitError:
        return None


@pytest.mark.parametrize("name", ["none", "one", "all but one"])
@pytest.mark.parametrize("wishes", [{}, {"chunk": 100}, {"hot_tokens": 700}], ids=str)
@pytest.mark.parametrize("tokens", [600, 4_096, 30_000])
def test_what_is_compiled_is_held_whole(name: str, tokens: int, wishes: dict[str, Any]) -> None:
    windows = {"none": (), "one": (WindowCost(512, 16_640),), "all but one": (WindowCost(4_096, 22 * 16_640),)}[name]
    costs = replace(COSTS, windows=windows, scoring_bytes_per_token=800)
    found = [compiled(limit, tokens, costs, **wishes) for limit in LIMITS]
    possible = [each is not None for each in found]
    assert possible == sorted(possible)
    assert possible[-1]
    for limit, each in zip(LIMITS, found, strict=True):
        if each is None:
            continue
        assert each.placement == "compiled"
        assert each.total_bytes <= limit * (1 - MARGIN_SHARE) - MARGIN_BYTES
        assert each.capacity_tokens >= tokens
        assert each.hot_tokens == wishes.get("hot_tokens", 512)
        assert each.kv_limit_bytes >= costs.kv_bytes(tokens + each.chunk)
        for window in windows:  # all of it is kept while a piece is repeated, however much that pushes out
            held = min(window.window, tokens)
            assert each.window_bytes >= 2 * held // 64 * window.page_bytes
        assert each.held_bytes(tokens) < each.kv_limit_bytes
        assert "reads it again to rank its pairs" in why(each)
    with pytest.raises(MemoryLimitError, match=f"{tokens:,} tokens with this model, all of which are held") as caught:
        compiled_plan(costs, 600 * MB, tokens=tokens, wishes=Wishes(**wishes), after=planned(8 * GB, 30_000, costs))
    least = caught.value.smallest_bytes
    assert compiled(least, tokens, costs, **wishes)
    assert compiled(least - 4, tokens, costs, **wishes) is None


def test_a_budget_is_for_what_is_left_after_compiling() -> None:
    found = compiled(8 * GB, 20_000, hot_tokens=None, budget_bytes=20_000_000)
    assert found is not None
    assert 0 < (found.hot_tokens or 0) < 2_000
    assert found.kv_limit_bytes > 200_000_000
    wishes = Wishes(budget_bytes=20_000_000)
    with pytest.raises(MemoryLimitError, match="^524MB of memory is too little"):
        compiled_plan(COSTS, 500 * MB, tokens=20_000, wishes=wishes, after=found)


def test_the_reason_names_the_whole_cache() -> None:
    found = archived(1 * GB, 30_000, 0)
    assert found is not None
    whole = found.full_limit_bytes
    assert plan(whole, 30_000, ARCHIVE_COSTS, keep_everything=True)
    assert f"full cache would need {format_size(whole, round_up=True)}" in why(found, "q8")
    assert "no" not in why(found, found.codec).split()
    assert "neither memory nor disk has room for q8" in why(found, "q8")
    assert why(planned(8 * GB, 300), "q8") == "The full cache fits: every token stays as it is."
    budget = archived(8 * GB, 8_192, budget_bytes=12_500_000)
    assert budget is not None
    assert "would fit into the memory, but not into what --kv allows" in why(budget, "q8")


def test_what_is_held_after_reading() -> None:
    whole = planned(8 * GB, 8_192)
    assert whole.held_bytes(8_192) == pytest.approx(8_192 * COSTS.kv_bytes_per_page / 64, rel=0.01)
    found = archived(8 * GB, 8_192, budget_bytes=40_000_000)
    assert found is not None
    assert found.hot_tokens == 1088
    beside = found.warm_bytes + found.digest_bytes + found.recall_bytes
    assert found.held_bytes(8_192) == pytest.approx(beside + 1120 * COSTS.kv_bytes_per_page / 64, rel=0.02)
    assert found.held_bytes(8_192) < found.kv_ram_bytes


def test_the_reason_is_the_length_only_where_it_is() -> None:
    long = archived(8 * GB, WHOLE_TOKENS + 1, 0)
    short = archived(8 * GB, WHOLE_TOKENS, 0, budget_bytes=75_000_000)
    assert long is not None
    assert short is not None
    assert (long.placement, short.placement) == ("warm", "warm")
    assert "Long texts are read and answered faster" in why(long, "q8")
    assert "not into what --kv allows" in why(short, "q8")


# --- Layers with a window

PAGE = 16_640
WINDOWED = {
    "gemma3": replace(COSTS, kv_bytes_per_page=6 * PAGE, heads=3, windows=(WindowCost(512, 42 * PAGE),)),
    "gemma2": replace(COSTS, kv_bytes_per_page=24 * PAGE, heads=12, windows=(WindowCost(4096, 24 * PAGE),)),
    "two": replace(COSTS, kv_bytes_per_page=6 * PAGE, heads=3,
                   windows=(WindowCost(100, 12 * PAGE), WindowCost(1024, 30 * PAGE))),
    "all": replace(COSTS, kv_bytes_per_page=0, windows=(WindowCost(4096, 48 * PAGE),)),
}  # fmt: skip
WINDOW_ROW = "KV cache of layers or heads with a window"


def with_archive(costs: Costs) -> Costs:
    heads = costs.kv_bytes_per_page / PAGE
    archives = tuple(
        ArchiveCost(name, heads * size, "landmark", heads * 68 / 16) for name, size in (("q8", 132), ("q2", 36))
    )
    return replace(costs, archive=archives, scoring_bytes_per_token=500)


@pytest.mark.parametrize("settings", [*SETTINGS, {"archive": True}, {"archive": True, "disk_bytes": GB}], ids=str)
@pytest.mark.parametrize("tokens", [1, 700, 8_192, 30_000])
@pytest.mark.parametrize("name", WINDOWED)
def test_windowed_plans_over_a_sweep_of_limits(name: str, tokens: int, settings: dict[str, Any]) -> None:
    costs = with_archive(WINDOWED[name])
    found = [plan(limit, tokens, costs, longest_tokens=32_768, **settings) for limit in LIMITS[::5]]
    for limit, each in zip(LIMITS[::5], found, strict=True):
        if each is None:
            continue
        rows = dict(each.rows)
        assert each.total_bytes <= limit * (1 - MARGIN_SHARE) - MARGIN_BYTES
        assert each.kv_limit_bytes == rows["KV cache"] + rows[WINDOW_ROW]
        assert each.window_bytes == rows[WINDOW_ROW] > 0
        assert each.fork_bytes == rows["hot pages of a fork"]
        assert each.held_bytes(tokens) <= each.kv_ram_bytes
        assert each.codec is None or (settings.get("archive") and name != "all")
        own = min(each.capacity_tokens, 30_000) if each.codec is None else 30_000
        for window in costs.windows:
            pruned = each.placement == "pruned" and window.window > (each.hot_tokens or 0)
            most = own if pruned else min(own, window.window + 126 + each.chunk)
            assert each.window_bytes >= -(-most // 64) * window.page_bytes
            if not pruned:  # what a question of so many tokens pushes out is kept until it was read
                assert each.window_bytes >= -(-(most + min(own, 500, window.window)) // 64) * window.page_bytes
        if each.hot_tokens is None:
            assert each.capacity_tokens >= tokens
    possible = [each is not None for each in found]
    assert possible == sorted(possible)


@pytest.mark.parametrize("settings", [*SETTINGS, {"archive": True}, {"archive": True, "disk_bytes": GB}], ids=str)
@pytest.mark.parametrize("tokens", [1, 300, 4_224, 30_000])
@pytest.mark.parametrize("name", WINDOWED)
def test_the_smallest_limit_with_windows_works_and_less_does_not(
    name: str, tokens: int, settings: dict[str, Any]
) -> None:
    costs = with_archive(WINDOWED[name])
    limit = smallest(tokens, costs, **settings)
    assert plan(limit, tokens, costs, **settings)
    assert plan(limit - 4, tokens, costs, **settings) is None


@pytest.mark.parametrize("settings", [{"keep_everything": True}, {"archive": True}], ids=str)
def test_windowed_layers_take_the_same_at_any_length(settings: dict[str, Any]) -> None:
    sizes, held = [], []
    for tokens in (10_000, 20_000, 100_000):
        found = planned(100 * GB, tokens, with_archive(WINDOWED["gemma3"]), **settings)
        sizes.append((found.window_bytes, found.fork_bytes))
        held.append(found.held_bytes(tokens) - found.warm_bytes - found.digest_bytes)
    assert sizes[0] == sizes[1] == sizes[2]
    if settings.get("archive"):
        assert held[0] == held[1] == held[2]


def test_where_all_layers_have_a_window_nothing_is_archived_and_nothing_grows() -> None:
    costs = with_archive(WINDOWED["all"])
    for tokens in (10_000, 1_000_000):
        found = planned(2 * GB, tokens, costs, archive=True, disk_bytes=GB, longest_tokens=32_768)
        assert (found.placement, found.codec, found.hot_tokens) == ("full", None, None)
        assert found.capacity_tokens > 1 << 30  # no length of a conversation is too much
        assert found.kv_limit_bytes == 48 * PAGE * -(-(4096 + 128 + found.chunk + 1024 + 64) // 64)
