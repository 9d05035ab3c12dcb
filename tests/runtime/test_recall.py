"""Conversations whose old tokens lie in an archive: in memory or on disk, longer than the model was trained for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from satchel.cache import KVCache
from satchel.devices.files.cache_folder import cold_folder
from satchel.devices.planner import WHOLE_TOKENS
from satchel.devices.sizes import parse_size
from satchel.errors import ContextLengthError, MemoryLimitError, StorageError
from satchel.runtime import Context, Model

Load = Callable[..., Model]
EXACT: dict[str, Any] = {"types": ("Q8_0",)}
DOCUMENT = "The maintainer uploads. Nobody else may, without consent, in the first week. " * 45  # 3,300 tokens
QUESTION = "Who may upload, and when, and what if the maintainer is away? " * 3
LIVELY: dict[str, Any] = {"temperature": 20.0, "seed": 11}
ON_DISK = "400KB"  # a budget of the tiny model's cache, which takes 840 KB for the whole document
IN_LITTLE = "500KB"  # holds all of it in 3 bits
IN_MEMORY = {"budget_bytes": "800KB", "codec": "grouped4"}


@pytest.fixture
def load(load_tiny: Load) -> Load:
    """``load_tiny`` without snapshots: every test reads for itself."""
    return lambda *arguments, **options: load_tiny(*arguments, **{"cache": False, **options})


def memory_of(context: Context) -> int:
    return sum(context.kv[f"{tier}_bytes"] for tier in ("hot", "warm", "digest"))


@pytest.mark.parametrize(
    ("kv", "placement"),
    [({"budget_bytes": "300KB"}, "cold"), ({"budget_bytes": ON_DISK}, "cold"), (IN_MEMORY, "warm")],
    ids=["300KB", ON_DISK, "memory"],
)
def test_reading_and_asking_stay_inside_the_budget(load: Load, kv: dict[str, str], placement: str) -> None:
    model = load(EXACT, kv=kv)
    sizes = []
    with model.read_text(DOCUMENT) as context:
        assert (context.policy, context.plan.placement) == ("recall", placement)
        assert context.plan.hot_tokens is not None
        for turn in range(4):
            answer = context.ask(QUESTION, max_new_tokens=100, temperature=20.0, seed=turn)
            assert answer.usage.finish_reason in ("stop", "length")
            assert answer.usage.policy == "recall"
            sizes.append(memory_of(context))
            used = context.kv
            assert used["total_tokens"] == context.tokens
            assert used["hot_tokens"] <= context.plan.capacity_tokens
            assert used["lost_tokens"] == 0
            assert (used["cold_bytes"] > 0) == (used["flash_bytes_read"] > 0) == (placement == "cold")
            assert (used["warm_bytes"] > 0) == (placement == "warm")
    assert max(sizes) <= parse_size(kv["budget_bytes"])


def test_a_document_is_read_chunk_by_chunk(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(EXACT, kv={"budget_bytes": ON_DISK})
    held: list[int] = []
    original = KVCache.demote

    def demote(cache: KVCache, hot_tokens: int | None = None) -> None:
        original(cache, hot_tokens)
        held.append(cache.held_tokens())

    monkeypatch.setattr(KVCache, "demote", demote)
    calls: list[int] = []
    with model.read_text(DOCUMENT, progress=lambda _stage, done, _total: calls.append(done)) as context:
        plan = context.plan
        assert plan.hot_tokens is not None
        assert calls == [*range(0, context.tokens, plan.chunk), context.tokens]
        assert len(held) > 5
        assert max(held) <= plan.hot_tokens + 63


def test_everything_recalled_is_nearly_the_full_cache(load: Load) -> None:
    """With room to recall the whole archive the logits are those of the whole cache, but for its 8 bits."""
    text = DOCUMENT[:1200]
    kv = {"hot_tokens": 192, "sinks": 16, "window": 176, "chunk": 64, "codec": "q8", "recall_tokens": 2048}
    full, recall = load(EXACT, policy="full"), load(EXACT, kv=kv)
    with full.read_text(text) as whole, recall.read_text(text) as recalled:
        assert (whole.policy, recalled.policy) == ("full", "recall")
        assert recalled.kv["hot_tokens"] < whole.kv["hot_tokens"] / 3
        ids = whole._turn_ids(QUESTION)
        expected, got = whole.append(ids), recalled.append(ids)
        assert abs(got - expected).max() < 0.05 * (expected.max() - expected.min())
    kv["recall_tokens"] = 0
    with load(EXACT, kv=kv).read_text(text) as blind:  # which the comparison notices
        assert abs(blind.append(ids) - expected).max() > 0.1 * (expected.max() - expected.min())


def test_a_window_of_the_hot_tier_hides_nothing_of_a_layers_own(load: Load) -> None:
    """They recall nothing, and hold their window however little is hot in the other layers."""
    windowed = {**EXACT, "architecture": "gemma3", "layers": 4, "metadata": {".attention.sliding_window": 300}}
    kv = {"sinks": 16, "window": 64, "chunk": 64, "codec": "f16", "recall_tokens": 2048, "storage": "fp32"}
    full, recall = load(windowed, policy="full", kv={"storage": "fp32"}), load(windowed, kv={**kv, "hot_tokens": 80})
    with full.read_text(DOCUMENT[:1500]) as whole, recall.read_text(DOCUMENT[:1500]) as recalled:
        assert recalled.policy == "recall"
        assert (recalled.plan.window, recalled.plan.hot_tokens) == (64, 80)
        ids = whole._turn_ids(QUESTION)
        expected, got = whole.append(ids), recalled.append(ids)
        assert abs(got - expected).max() < 2e-3 * (expected.max() - expected.min())


def test_forks_and_second_turns(load: Load) -> None:
    def asked(context: Context) -> str:
        return context.ask("And then?", max_new_tokens=30, **LIVELY).text

    model = load(EXACT, kv={"budget_bytes": ON_DISK})
    with model.read_text(DOCUMENT) as context:
        before = context.kv
        found = []
        for _ in range(2):
            with context.fork() as branch:
                found.append((branch.ask(QUESTION, max_new_tokens=30, **LIVELY).text, asked(branch)))
                assert branch.tokens > before["total_tokens"]
        assert found[0] == found[1]
        tokens = {key: before[key] for key in ("hot_bytes", "cold_bytes", "hot_tokens", "total_tokens")}
        assert {key: context.kv[key] for key in tokens} == tokens
        assert (context.ask(QUESTION, max_new_tokens=30, **LIVELY).text, asked(context)) == found[0]


@pytest.mark.parametrize("budget", ["300KB", ON_DISK, "900KB"])
def test_a_fork_does_not_run_out_of_memory_beside_what_it_was_forked_from(load: Load, budget: str) -> None:
    """Both come to have a window of their own: an answer of a fork must not be cut for it."""
    model = load(EXACT, kv={"budget_bytes": budget})
    with model.read_text(DOCUMENT) as context:
        branch = context.fork()
        for seed in range(4):
            usage = branch.ask(QUESTION, max_new_tokens=200, temperature=20.0, seed=seed).usage
            assert usage.finish_reason in ("stop", "length")
            assert memory_of(branch) <= parse_size(budget)
        assert context.ask("Who?", max_new_tokens=5).usage.finish_reason in ("stop", "length")


def test_longer_than_the_model_was_trained_for(load: Load) -> None:
    options = {**EXACT, "context_length": 512}
    with load(options, kv={"budget_bytes": ON_DISK}).read_text(DOCUMENT) as context:
        assert context.tokens > 5 * 512
        for question in (QUESTION, "And then?"):
            answer = context.ask(question, max_new_tokens=20, **LIVELY)
            assert answer.usage.finish_reason in ("stop", "length")
            assert answer.usage.new_tokens > 0
        assert context.kv["total_tokens"] > 5 * 512
    for policy in ("full", "snapkv"):
        with pytest.raises(ContextLengthError, match=rf"at most 512 with policy {policy}; use policy auto"):
            load(options, policy=policy).read_text(DOCUMENT)


@pytest.mark.parametrize(("repeats", "budget"), [(1, IN_LITTLE), (3, "3MB")])
def test_a_long_text_is_recalled_side_by_side_with_the_window(load: Load, repeats: int, budget: str) -> None:
    """A shorter one where it was. What is set holds, but never nearer than it takes to lie beside what is hot; and
    pairs that scored well and stay hot stay where they were.
    """
    options = {**EXACT, "context_length": 32_768}
    small = {"sinks": 16, "window": 112, "chunk": 64, "recall_tokens": 64, "codec": "grouped3", "budget_bytes": budget}

    def answer(**kv: object) -> list[float]:
        with load(options, kv={**small, **kv}).read_text(DOCUMENT * repeats) as context:
            assert (context.tokens > WHOLE_TOKENS) == (repeats == 3)
            row = context.append([5])
            assert row is not None
            return [float(value) for value in row]

    side_by_side, far = answer(reach=1), answer(reach=32_768)
    assert len({*map(tuple, (side_by_side, answer(reach=500), far))}) == 3
    assert answer() == (side_by_side if repeats == 3 else far)
    assert answer(reach=300) == side_by_side
    scored = {"hot_tokens": 200}
    assert answer(**scored, reach=500) == answer(**scored)


def test_a_long_text_goes_to_the_archive_however_large_the_memory_is(load: Load) -> None:
    notices: list[str] = []
    model = load({**EXACT, "context_length": 32_768}, notice=notices.append)
    assert model.plan(WHOLE_TOKENS).placement == "full"
    assert model.plan(WHOLE_TOKENS + 1).placement == "warm"
    with model.read_text(DOCUMENT * 3) as context:
        assert (context.policy, context.kv["cold_bytes"]) == ("recall", 0)
    (line,) = notices
    assert line.startswith("Long texts are read and answered faster from an archive: ")


def test_without_a_disk_the_archive_lies_in_memory_or_the_error_names_what_would_do(load: Load) -> None:
    with load(EXACT, disk="0", kv={"budget_bytes": IN_LITTLE}).read_text(DOCUMENT) as context:
        assert (context.policy, context.plan.placement, context.plan.codec) == ("recall", "warm", "grouped3")
        context.ask(QUESTION, max_new_tokens=20)
        assert context.kv["cold_bytes"] == context.kv["flash_bytes_read"] == context.kv["lost_tokens"] == 0
        assert memory_of(context) <= parse_size(IN_LITTLE)
    with pytest.raises(MemoryLimitError, match=r"give --disk more") as caught:
        load(EXACT, disk="0", kv={"budget_bytes": "150KB"}).read_text(DOCUMENT)
    message = str(caught.value)
    assert message.startswith("kv budget_bytes=150KB is too little for ")
    assert "\n" not in message
    named = re.search(r": ([\d.]+KB) would do", message)
    assert named
    with load(EXACT, disk="0", kv={"budget_bytes": named[1]}).read_text(DOCUMENT) as context:
        assert context.ask("Who?", max_new_tokens=3).usage.new_tokens > 0


def test_a_whole_cache_that_outgrows_its_memory_is_archived(load: Load) -> None:
    notices: list[str] = []
    model = load(EXACT, kv={"sinks": 4, "window": 16}, notice=notices.append)
    with model.read_text(DOCUMENT[:600]) as context:
        assert (context.policy, notices) == ("full", [])
        context.plan = replace(context.plan, capacity_tokens=context.tokens + 100, chunk=64)
        context.ask(QUESTION, max_new_tokens=20)
        assert context.policy == "recall"
        assert context.kv["hot_tokens"] <= context.plan.capacity_tokens
        assert context.kv["cold_bytes"] > 0
        context.ask(QUESTION, max_new_tokens=20)
    (line,) = notices
    assert line.startswith("the memory limit is reached: 20 tokens stay hot from here on")


def test_notices_are_told_once(load: Load) -> None:
    notices: list[str] = []
    model = load(EXACT, kv={"budget_bytes": ON_DISK}, notice=notices.append)
    with model.read_text(DOCUMENT) as context:
        for _ in range(3):
            context.ask("Who?", max_new_tokens=30)
            context.fork().ask("When?", max_new_tokens=30)
    (line,) = notices
    assert "the others are kept as q8 on disk" in line


def test_a_disk_that_is_full_loses_tokens_and_says_so(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversation goes on with what there is."""
    notices: list[str] = []
    model = load(EXACT, kv={"budget_bytes": ON_DISK}, notice=notices.append)
    archive_of = Model._archive_of

    def with_a_small_disk(model: Model, plan: Any) -> Any:
        options = archive_of(model, plan)
        assert options is not None
        return replace(options, cold_bytes=100_000)

    monkeypatch.setattr(Model, "_archive_of", with_a_small_disk)
    with model.read_text(DOCUMENT) as context:
        lost = context.kv["lost_tokens"]
        assert 0 < lost < context.tokens
        assert context.kv["cold_bytes"] <= 100_000
        read = context.tokens
        for _ in range(3):
            answer = context.ask(QUESTION, max_new_tokens=50)
            assert answer.usage.finish_reason in ("stop", "length", "repetition")
        context.fork().ask(QUESTION, max_new_tokens=50)
    told = [line for line in notices if "can no longer be recalled" in line]
    assert len(told) == 1, told
    assert f"{lost:,} of {read:,} tokens" in told[0]


def test_a_cold_folder_that_is_a_file(load: Load, tmp_path: Path) -> None:
    model = load(EXACT, kv={"budget_bytes": ON_DISK}, cache_dir=tmp_path)
    cold_folder(tmp_path).write_text("not a folder")
    with pytest.raises(StorageError) as caught:
        model.read_text(DOCUMENT)
    assert "\n" not in str(caught.value)
    assert str(cold_folder(tmp_path)) in str(caught.value)
    assert not model._contexts


def test_a_cold_folder_that_cannot_be_written(load: Load, tmp_path: Path) -> None:
    """It is there when the reading begins, and takes no file when the first tokens leave the hot tier."""
    model = load(EXACT, kv={"budget_bytes": ON_DISK}, cache_dir=tmp_path)

    def take_away(stage: str, done: int, total: int | None) -> None:
        del stage, total
        if done == 0:
            cold_folder(tmp_path).rmdir()

    with pytest.raises(StorageError) as caught:
        model.read_text(DOCUMENT, progress=take_away)
    assert "\n" not in str(caught.value)
    assert str(cold_folder(tmp_path)) in str(caught.value)
    assert "--disk 0" in str(caught.value)
    assert not model._contexts


def test_nothing_is_left_on_the_disk(load: Load, tmp_path: Path) -> None:
    model = load(EXACT, kv={"budget_bytes": ON_DISK}, cache_dir=tmp_path)
    with model.read_text(DOCUMENT) as context:
        assert context.kv["cold_bytes"] > 0
        if os.name == "posix":  # a file without a name
            assert list(cold_folder(tmp_path).iterdir()) == []
    assert list(cold_folder(tmp_path).iterdir()) == []


# --- Reopened


def test_a_snapshot_reopens_in_less_memory_than_it_was_read_in(load_tiny: Load, tmp_path: Path) -> None:
    """The window is the new plan's: what was hot beyond it goes to the archive."""
    kv = {"codec": "q8"}
    large = load_tiny(EXACT, kv={**kv, "budget_bytes": "700KB", "window": 400}, cache_dir=tmp_path)
    with large.read_text(DOCUMENT) as context:
        assert not context.reopened
        held = context.kv["hot_tokens"]
    small = load_tiny(EXACT, kv={**kv, "budget_bytes": "400KB"}, cache_dir=tmp_path)
    with small.read_text(DOCUMENT) as context:
        assert context.reopened
        assert context.kv["hot_tokens"] < held
        assert memory_of(context) <= 400_000
        branch = context.fork()
        for seed in range(3):
            usage = branch.ask(QUESTION, max_new_tokens=200, temperature=20.0, seed=seed).usage
            assert usage.finish_reason in ("stop", "length")
            assert memory_of(branch) <= 400_000
    with load_tiny(EXACT, kv={**kv, "budget_bytes": "700KB"}, cache_dir=tmp_path).read_text(DOCUMENT) as context:
        assert context.reopened
        context.ask(QUESTION, max_new_tokens=20)


def test_whole_caches_with_and_without_an_archive_to_be_are_told_apart(load_tiny: Load, tmp_path: Path) -> None:
    notices: list[str] = []
    for options in ({}, {"policy": "full"}, {"disk": "0"}, {"kv": {"codec": "grouped4"}}, {}):
        model = load_tiny(EXACT, cache_dir=tmp_path, notice=notices.append, **options)
        with model.read_text(DOCUMENT) as context:
            assert context.policy == "full"
    assert context.reopened
    assert [line for line in notices if "snapshot" in line] == []
