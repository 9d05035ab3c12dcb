"""Models whose layers see a window only: these hold a window's worth at any length, and nothing is missed.

What all else is compared with is `whole_logits`: the same graph with a cache in which every layer keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import satchel
from numpy.typing import NDArray
from satchel import kernels
from satchel.cache import WINDOW_SLACK, CacheShape, KVCache
from satchel.cache.snapshots import Snapshot
from satchel.devices.files.cache_folder import snapshots_folder
from satchel.devices.sizes import parse_size
from satchel.runtime import Context, Model
from satchel.runtime.engines import NativeEngine
from stopping import Session, interrupt

Load = Callable[..., Model]
WINDOW, LAYERS = 100, 4
GEMMA: dict[str, Any] = {
    "types": ("Q8_0",), "architecture": "gemma3", "layers": LAYERS, "metadata": {".attention.sliding_window": WINDOW},
}  # fmt: skip
MISTRAL = {"types": ("Q8_0",), "architecture": "phi3", "layers": 2, "metadata": {".attention.sliding_window": WINDOW}}
FP32 = {"storage": "fp32"}
RECALL = {**FP32, "sinks": 16, "window": 48, "hot_tokens": 64, "chunk": 64, "codec": "f16", "recall_tokens": 4096}
DOCUMENT = "The maintainer uploads. Nobody else may, without consent, in the first week. " * 20
LONG_QUESTION = "Who may upload, and when, and what if the maintainer is away? " * 8
LIVELY: dict[str, Any] = {"temperature": 20.0, "seed": 11}
POLICIES: list[dict[str, Any]] = [{"policy": "full", "kv": FP32}, {"kv": RECALL}]
NAMES = ["full", "recall"]


def shape_of(model: Model) -> CacheShape:
    assert isinstance(model.engine, NativeEngine)
    return model.engine.cache_shape


def native_of(context: Context) -> kernels.KVCache:
    assert isinstance(context._cache, KVCache)
    return context._cache._native


def windowed(model: Model) -> list[int]:
    return [layer for layer, window in enumerate(model.package.spec.attention_windows) if window]


def held(context: Context) -> list[int]:
    """Tokens of each layer with a window."""
    return [native_of(context).tokens(layer, 0) for layer in windowed(context._model)]


def state(context: Context) -> list[NDArray[Any]]:
    """All that layers with a window hold."""
    native, heads = native_of(context), context._model.package.spec.kv_heads
    return [
        array for layer in windowed(context._model) for head in range(heads) for array in native.read(layer, head)
    ]  # fmt: skip


def whole_logits(model: Model, ids: list[int]) -> NDArray[np.float32]:
    shape = replace(shape_of(model), windows=())
    cache = KVCache(shape, model.options.settings, hot_tokens=None)
    row = model.engine.run(ids, cache)
    assert cache.held_tokens() == len(ids)
    cache.close()
    return row


def check(model: Model, context: Context, ids: list[int], tolerance: float) -> None:
    """The logits after ``ids`` and a question are those of caches that keep everything."""
    more = context._turn_ids("Who may upload?")
    expected, got = whole_logits(model, ids + more), context.fork().append(more)
    assert abs(got - expected).max() <= tolerance * np.ptp(expected)


@pytest.fixture
def load(load_tiny: Load) -> Load:
    """``load_tiny`` without snapshots: every test reads for itself."""
    return lambda *arguments, **options: load_tiny(*arguments, **{"cache": False, **options})


@pytest.mark.parametrize("options", POLICIES, ids=NAMES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_nothing_is_missed(load: Load, options: dict[str, Any], chunk: int) -> None:
    text = DOCUMENT[: 450 if chunk == 1 else 1200]
    model = load(GEMMA, **{**options, "kv": {**options["kv"], "chunk": chunk}})
    ids = model._first_ids(text, None)
    with model.read_text(text) as context:
        assert context.policy == ("recall" if "codec" in options["kv"] else "full")
        check(model, context, ids, 2e-3 if context.policy == "recall" else 1e-4)
        assert len(windowed(model)) == 2
        assert max(held(context)) <= WINDOW + WINDOW_SLACK + 62


@pytest.mark.parametrize("options", POLICIES, ids=NAMES)
def test_twice_the_text_takes_no_more(load: Load, options: dict[str, Any]) -> None:
    model, found = load(GEMMA, **options), []
    shape = shape_of(model)
    for copies in (1, 2):
        with model.read_text(DOCUMENT * copies) as context:
            found.append((context.plan.window_bytes, context.plan.fork_bytes, context.kv["hot_bytes"]))
            assert WINDOW + 63 <= min(held(context)) <= max(held(context)) <= WINDOW + WINDOW_SLACK + 62
            in_full = context._cache.held_tokens()
            pages = -(-in_full // 64) * len(shape.full_layers) + sum(-(-tokens // 64) for tokens in held(context))
            native = native_of(context)
            page = native.page_bytes
            assert native.bytes == pages * shape.kv_heads * page
            assert native.bytes <= context.plan.kv_limit_bytes
            context.ask(LONG_QUESTION, max_new_tokens=20)
            assert native.pool_bytes == native.bytes  # nothing is kept of the question
    assert found[0][:2] == found[1][:2]
    if options is POLICIES[1]:  # what waits to be a whole page or cell
        assert abs(found[0][2] - found[1][2]) <= 2 * LAYERS * shape.kv_heads * page


@pytest.mark.parametrize("options", POLICIES, ids=NAMES)
@pytest.mark.parametrize("number", [1, 3, 6])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["cancel", "interrupt"])
def test_a_long_question_that_is_stopped_has_not_been(
    load: Load, options: dict[str, Any], number: int, after: bool, kind: str
) -> None:
    """It pushes all out of the windows that was there before it."""
    model = load(GEMMA, **{**options, "kv": {**options["kv"], "chunk": 64}})
    with model.read_text(DOCUMENT[:1000]) as context, model.read_text(DOCUMENT[:1000]) as never:
        assert len(context._turn_ids(LONG_QUESTION)) > 6 * 64 > WINDOW + 2 * WINDOW_SLACK
        before, tokens, size = state(context), context.tokens, native_of(context).pool_bytes
        session = Session(model, number, context.cancel if kind == "cancel" else interrupt, after=after)
        if kind == "cancel":
            assert context.ask(LONG_QUESTION, max_new_tokens=4).usage.finish_reason == "cancelled"
        else:
            with pytest.raises(KeyboardInterrupt):
                context.ask(LONG_QUESTION, max_new_tokens=4)
        session.remove()
        assert context.tokens == tokens
        for mine, theirs in zip(state(context), before, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        check(model, context, model._first_ids(DOCUMENT[:1000], None), 2e-3)
        if context.policy == "full":
            assert native_of(context).pool_bytes == size
            asked = [each.ask("When?", max_new_tokens=9, **LIVELY).text for each in (context, never)]
            assert asked[0] == asked[1]


def test_turns_and_forks(load: Load) -> None:
    model = load(GEMMA, policy="full", kv=FP32)
    with model.read_text(DOCUMENT) as context:
        ids = model._first_ids(DOCUMENT, None)
        branches = [context.fork() for _ in range(2)]
        for branch in branches:
            for question in ("Who?", LONG_QUESTION, "And then?"):
                branch.ask(question, max_new_tokens=70, **LIVELY)
        assert branches[0].last_answer.text == branches[1].last_answer.text  # type: ignore[union-attr]
        check(model, context, ids, 1e-4)
        native = native_of(context)
        assert native.pool_bytes <= context.plan.kv_limit_bytes + context.plan.fork_bytes + native.bytes


@pytest.mark.parametrize("budget", ["430KB", "550KB", "900KB"])
def test_what_was_planned_is_enough(load: Load, budget: str) -> None:
    """For long questions, cancelled ones, and a fork beside what it was forked from, which stays inside the budget."""
    model = load(GEMMA, kv={"budget_bytes": budget})
    with model.read_text(DOCUMENT * 2) as context:
        assert context.policy == "recall"
        branch = context.fork()
        for seed in range(4):
            for talk in (branch, context) if seed == 3 else (branch,):
                usage = talk.ask(LONG_QUESTION, max_new_tokens=150, temperature=20.0, seed=seed).usage
                assert usage.finish_reason in ("stop", "length")
                assert talk._cache.usage().memory_bytes <= parse_size(budget)
            session = Session(model, 2, branch.cancel, after=True)
            assert branch.ask(LONG_QUESTION).usage.finish_reason == "cancelled"
            session.remove()


def test_a_whole_cache_that_is_nearly_full_has_room_for_the_windows_of_a_fork(load: Load) -> None:
    model = load({**GEMMA, "context_length": 2300}, policy="full", kv={**FP32, "chunk": 64})
    with model.read_text(DOCUMENT) as context:
        branch = context.fork()
        for seed in range(4):
            usage = branch.ask("Who may upload, and when? " * 4, max_new_tokens=30, temperature=20.0, seed=seed).usage
            assert usage.finish_reason in ("stop", "length")
        assert branch.tokens > context.tokens + 4 * WINDOW
        assert context.ask("Who?", max_new_tokens=40, **LIVELY).usage.finish_reason in ("stop", "length")
        assert native_of(context).pool_peak_bytes <= context.plan.kv_limit_bytes + context.plan.fork_bytes


# --- snapshots


def layer_sizes(root: Path) -> list[list[int]]:
    """Bytes of the layers' sections of every snapshot, the shortest text's first."""
    found = []
    for path in snapshots_folder(root).rglob("*.satchel"):
        with Snapshot.open(path) as snapshot:
            names = sorted(name for name in snapshot.sections if name.startswith("layer-"))
            archived = [name for name in snapshot.sections if name.startswith("payload-")]
            assert archived in ([], ["payload-001", "payload-003"])
            found.append((snapshot.find("tokens").original_bytes, [snapshot.find(n).original_bytes for n in names]))
    return [sizes for _, sizes in sorted(found)]


@pytest.mark.parametrize("options", POLICIES, ids=NAMES)
def test_snapshots_hold_the_windows_only(load_tiny: Load, tmp_path: Path, options: dict[str, Any]) -> None:
    rows = []
    for reopened in (False, True):
        for copies in (1, 2):
            model = load_tiny(GEMMA, cache_dir=tmp_path, **options)
            with model.read_text(DOCUMENT[: 768 * copies]) as context:
                assert context.reopened is (reopened or copies == 2)
                rows.append(context.append(context._turn_ids("Who may upload, and when?")))
                check_ids = model._first_ids(DOCUMENT[: 768 * copies], None)
                if reopened:
                    branch = model.read_text(DOCUMENT[: 768 * copies])
                    check(model, branch, check_ids, 2e-3)
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(rows[1], rows[3])
    first, second = layer_sizes(tmp_path)
    page = 2 * 64 * 16 * 4 * 2  # of both heads: keys and values of floats
    for layer in (0, 2):
        assert abs(first[layer] - second[layer]) <= page + 64 * 4 * 2  # pages begin where they may
    for layer in (1, 3):
        assert second[layer] > first[layer]


@pytest.mark.parametrize("options", POLICIES, ids=NAMES)
def test_a_document_that_parts_from_a_saved_one_early_is_read_again(
    load_tiny: Load, tmp_path: Path, options: dict[str, Any]
) -> None:
    notices: list[str] = []
    load_tiny(GEMMA, cache_dir=tmp_path, **options).read_text(DOCUMENT).close()
    model = load_tiny(GEMMA, cache_dir=tmp_path, notice=notices.append, **options)
    text = DOCUMENT[:700] + "But then, who knows? " * 10
    with model.read_text(text) as context:
        assert not context.reopened
        check(model, context, model._first_ids(text, None), 2e-3)
    assert [line for line in notices if "snapshot" in line] == []
    shorter = DOCUMENT[:700] + "But then, "  # is a better beginning of a third one than the longer one
    load_tiny(GEMMA, cache_dir=tmp_path, **options).read_text(shorter).close()
    with load_tiny(GEMMA, cache_dir=tmp_path, **options).read_text(shorter + "nobody does.") as context:
        assert context.reopened


# --- budgets that forget, and models without a layer that sees everything


@pytest.mark.parametrize("scorer", ["recency", "snapkv", "keydiff", "h2o"])
@pytest.mark.parametrize("budget", [80, 128])
def test_a_budget_leaves_shorter_windows_alone(load: Load, scorer: str, budget: int) -> None:
    kv = {**FP32, "hot_tokens": budget, "sinks": 4, "window": 16, "chunk": 64}
    model = load(GEMMA, policy=scorer, kv=kv)
    with model.read_text(DOCUMENT) as context:
        native = native_of(context)
        for _ in range(3):
            assert context.kv["hot_tokens"] <= budget + 64
            assert native.bytes <= context.plan.kv_limit_bytes
            if budget < WINDOW:
                assert max(held(context)) <= budget + 64
            else:
                assert min(held(context)) >= WINDOW + 63
            context.fork().ask(LONG_QUESTION, max_new_tokens=30)
            context.ask(LONG_QUESTION, max_new_tokens=30)
        context._cache.demote()
        for layer in windowed(model) if budget < WINDOW else ():
            positions = native.positions(layer, 0)
            assert len(positions) == budget
            assert (positions > context.tokens - WINDOW).sum() >= min(budget, 60)  # not the sinks, which nobody sees


@pytest.mark.parametrize("scorer", ["finch", "h2o"])
def test_heads_share_a_budget_that_is_shorter_than_windows(load: Load, tmp_path: Path, scorer: str) -> None:
    kv = {**FP32, "hot_tokens": WINDOW - 10, "sinks": 4, "window": 16, "chunk": 64}
    kv |= {"head_budgets": "adaptive", "merge": "lookm"}
    answers = []
    for reopened in (False, True):
        model = load(GEMMA, policy=scorer, kv=kv, cache=True, cache_dir=tmp_path)
        with model.read_text(DOCUMENT) as context:
            assert context.reopened is reopened
            native, heads = native_of(context), range(model._package.spec.kv_heads)
            for _ in range(3):
                assert context.kv["hot_tokens"] <= WINDOW - 10 + 64
                assert native.bytes <= context.plan.kv_limit_bytes
                answers.append(context.ask(LONG_QUESTION, max_new_tokens=30, temperature=0).text)
            context._cache.demote()
            for layer in windowed(model):
                assert sum(native.tokens(layer, head) for head in heads) <= len(heads) * (WINDOW - 10)
                for head in heads:
                    positions = native.positions(layer, head)
                    assert (np.diff(positions) > 0).all()
                    assert (positions[-16:] == context.tokens - 16 + np.arange(16)).all()
    assert answers[:3] == answers[3:]


@pytest.mark.parametrize("policy", ["auto", "full", "snapkv"])
def test_windows_in_all_layers(load: Load, policy: str) -> None:
    """Nothing is archived, whatever the length, and nothing grows."""
    kv = {**FP32, "chunk": 64, **({"hot_tokens": 400} if policy == "snapkv" else {})}
    model = load({**MISTRAL, "context_length": 16384}, policy=policy, kv=kv)
    assert windowed(model) == [0, 1]
    bytes_held = []
    for copies in (1, 2, 8) if policy == "auto" else (1, 2):
        text = DOCUMENT * copies
        with model.read_text(text) as context:
            assert not context._cache.recalls
            assert context.policy == ("snapkv" if policy == "snapkv" else "full")
            assert held(context)[0] == context.kv["hot_tokens"] <= WINDOW + 126
            assert context.ask("Who?", max_new_tokens=9).usage.finish_reason in ("stop", "length")
            bytes_held.append(context.kv["hot_bytes"])
            page = native_of(context).page_bytes
        if copies < 8:
            with model.read_text(text) as context:
                check(model, context, model._first_ids(text, None), 1e-4)
    assert max(bytes_held) - min(bytes_held) <= 2 * 2 * page  # pages begin where they may


# --- a family of transformers


@pytest.mark.filterwarnings("default")
def test_gemma3_of_transformers_read_with_recall(tmp_path: Path) -> None:
    from family_folders import WINDOW as SMALL_WINDOW
    from family_folders import write_family_folder

    folder = write_family_folder(tmp_path / "hf", "gemma3", max_position_embeddings=4096)
    common: dict[str, Any] = {"cache": False, "threads": 2, "cache_dir": tmp_path, "notice": lambda _: None}
    text = DOCUMENT[:900]
    with satchel.load(folder, kv=RECALL, **common) as model:
        assert windowed(model) == [0, 1, 2, 3, 4, 6]
        ids = model._first_ids(text, None)
        with model.read_text(text) as context:
            assert context.policy == "recall"
            assert max(held(context)) <= SMALL_WINDOW + 126
            assert context.kv["warm_bytes"] + context.kv["cold_bytes"] > 0
            check(model, context, ids, 2e-3)
    blind = {**RECALL, "recall_tokens": 0}
    with satchel.load(folder, kv=blind, **common) as model:
        context = model.read_text(text)
        with pytest.raises(AssertionError):  # the comparison notices what is missing
            check(model, context, ids, 2e-3)
