"""A text is read whole, read again piece by piece, and pruned to what that has told: on tiny seeded weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.cache import KVCache
from satchel.cache.ranking import Ranking
from satchel.devices.files.cache_folder import snapshots_folder
from satchel.errors import ContextLengthError, MemoryLimitError, OptionError
from satchel.kernels.reference import apply_rope, largest_shares
from satchel.runtime import Context, Model, compiling
from satchel.runtime.engines import Cancelled, NativeEngine
from satchel.runtime.options import Options
from stopping import Session, interrupt

Load = Callable[..., Model]
EXACT: dict[str, Any] = {"types": ("Q8_0",)}
DOCUMENT = "The maintainer uploads. Nobody else may, without consent, in the first week. " * 15
MORE = "Only a team may, and then the second time, if the first one failed. " * 10
QUESTION = "Who may upload, and when?"
KV: dict[str, Any] = {"hot_tokens": 300, "sinks": 8, "window": 40}
LIVELY = {"temperature": 20.0, "seed": 11}


def cache_of(context: Context) -> KVCache:
    assert isinstance(context._cache, KVCache)
    return context._cache


def positions(context: Context, layer: int = 0) -> list[NDArray[np.int32]]:
    return [cache_of(context)._native.positions(layer, head) for head in range(2)]


def scores(context: Context, layer: int, head: int) -> NDArray[np.float32]:
    """Of all tokens that were compiled; those that were forgotten have none any more."""
    kept = cache_of(context)._ranking._kept[layer, head]
    found = np.full(kept.until, np.nan, np.float32)
    found[kept.positions[kept.positions < kept.until]] = kept.scores[kept.positions < kept.until]
    return found


def snapshots(root: Path) -> list[Path]:
    return sorted(snapshots_folder(root).rglob("*.satchel"))


@pytest.fixture
def load(load_tiny: Load, tmp_path: Path) -> Load:
    def loaded(gguf: dict[str, Any] | None = None, **arguments: Any) -> Model:
        options = {"policy": "kvzip", "kv": KV, "cache_dir": tmp_path, **arguments}
        return load_tiny({**EXACT, **(gguf or {})}, **options)

    return loaded


class Told:
    """Progress: how far each stage came, and from where."""

    def __init__(self) -> None:
        self.stages: dict[str, list[tuple[int, int]]] = {}

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        self.stages.setdefault(stage, []).append((done, total))


class Runs:
    """What went through the graph, in order, with the position of its first token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[tuple[int, list[int]]] = []
        original = NativeEngine.run

        def run(engine: NativeEngine, ids: Any, cache: KVCache, **options: Any) -> NDArray[np.float32]:
            self.ids.append((cache.total_tokens, list(ids)))
            return original(engine, ids, cache, **options)

        monkeypatch.setattr(NativeEngine, "run", run)

    def readings(self, total: int) -> list[list[int]]:
        """The ids of the text, which has ``total``, and then those that were read after it, each time anew."""
        found: list[list[int]] = [[]]
        for at, ids in self.ids:
            if at == total:
                found.append([])
            found[-1].extend(ids)
        return found


def test_scores_are_the_largest_shares_times_the_lengths_of_values(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written out: all queries of a run over everything, kept by a cache that observes them, and their softmax."""
    monkeypatch.setattr(compiling, "PIECE_TOKENS", 500)
    pruned: list[dict[tuple[int, int], NDArray[np.float32]]] = []
    original = KVCache.demote

    def demote(cache: KVCache, hot_tokens: int | None = None) -> None:
        if cache.ranked_until and not pruned:
            pruned.append({key: kept.scores.copy() for key, kept in cache._ranking._kept.items()})
        original(cache, hot_tokens)

    monkeypatch.setattr(KVCache, "demote", demote)
    runs = Runs(monkeypatch)
    model = load(kv={**KV, "storage": "fp32"}, cache=False)
    assert isinstance(model.engine, NativeEngine)
    with model.read_text(DOCUMENT) as context:
        total = context.tokens
    document, *pieces = runs.readings(total)
    head = len(model.tokenizer.encode_segments(model.template.prefix(None, None)))
    ends = [0, *range(head + 500, total, 500), total]
    assert len(pieces) == 3
    for (first, end), ids in zip(pairwise(ends), pieces, strict=True):
        cache = model.engine.new_cache(model.options.settings, hot_tokens=None)
        cache._native = kernels.KVCache(**{**cache._options, "observed_queries": 10_000})
        model.engine.run(document, cache)
        model.engine.run(ids, cache)
        for layer in range(2):
            queries, places = cache._native.observed(layer)
            turned = apply_rope(queries, places, cache._native.frequencies(layer))[total:]
            read = [cache._native.read(layer, each) for each in range(2)]
            shares = largest_shares(
                turned, [pair[0] for pair in read], places[total:], [pair[2] for pair in read],
                scale=cache.shape.scale,
            )  # fmt: skip
            for each in range(2):
                got = pruned[0][layer, each][first:end]
                worth = shares[each] * np.linalg.norm(read[each][1], axis=1)
                np.testing.assert_allclose(got, worth[first:end], rtol=2e-3, atol=1e-6)
        cache.close()


def test_the_model_is_asked_for_each_piece_and_given_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "PIECE_TOKENS", 400)
    runs, told = Runs(monkeypatch), Told()
    model = load(cache=False)
    with model.read_text(DOCUMENT, progress=told) as context:
        total = context.tokens
        assert cache_of(context).ranked_until == total
    read, *said = (model.tokenizer.decode(ids, special=True) for ids in runs.readings(total))
    assert read.endswith(DOCUMENT)
    assert said[0].startswith(f"\n\n{compiling.REQUEST}<|im_end|>\n<|im_start|>assistant\nThe maintainer")
    assert len(said) == 3
    answers = [text.split("<|im_start|>assistant\n", 1)[1] for text in said]
    assert "".join(answers) == DOCUMENT
    for before, text in zip(answers, said[1:], strict=False):
        quoted = text.split(compiling.LATER_REQUEST)[1].split("<|im_end|>")[0]
        assert quoted
        assert before.endswith(quoted)
    assert list(told.stages) == ["reading", "compiling"]
    done, totals = zip(*told.stages["compiling"], strict=True)
    assert done[0] == 0
    assert done[-1] == totals[-1] == sum(len(ids) for _, ids in runs.ids) - total
    assert list(done) == sorted(done)


@pytest.mark.parametrize("head_budgets", ["uniform", "adaptive"])
def test_the_best_stay(load: Load, head_budgets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head's pairs are made worth more than the other's, so that heads that compete hold different numbers."""
    keep = Ranking.keep
    monkeypatch.setattr(Ranking, "keep", lambda ranking, layer, head, first, found:
                        keep(ranking, layer, head, first, found * (1 + 9 * head)))  # fmt: skip
    with load(kv={**KV, "head_budgets": head_budgets}, cache=False).read_text(DOCUMENT) as context:
        total, cache = context.tokens, cache_of(context)
        assert cache.held_tokens() == 300
        assert context.policy == "kvzip"
        assert context.plan.hot_tokens == 300
        held = {}
        for layer in range(2):
            for head, places in enumerate(positions(context, layer)):
                held[layer, head] = len(places)
                assert set(range(8)) | set(range(total - 40, total)) <= set(places.tolist())
                found = scores(context, layer, head)
                assert np.isfinite(found[places]).all()
                assert np.isnan(np.delete(found, places)).all()
                assert found[places].min() >= 0
                norms = cache._native.value_norms(layer, head, 0, total)
                assert (found[places] <= norms * (1 + 9 * head)).all()
        pages = [sum(-(-held[layer, head] // kernels.PAGE_TOKENS) for head in range(2)) for layer in range(2)]
        assert max(pages) <= 2 * -(-300 // kernels.PAGE_TOKENS)
        assert (set(held.values()) == {300}) == (head_budgets == "uniform")


def test_what_is_forgotten_was_worth_less(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: dict[tuple[int, int], NDArray[np.float32]] = {}
    original = KVCache.keep_watched

    def keep_watched(cache: KVCache, first: int) -> None:
        original(cache, first)
        ranked.update({key: kept.scores for key, kept in cache._ranking._kept.items()})

    monkeypatch.setattr(KVCache, "keep_watched", keep_watched)
    with load(cache=False).read_text(DOCUMENT) as context:
        total = context.tokens
        for layer in range(2):
            for head, places in enumerate(positions(context, layer)):
                middle = np.arange(8, total - 40)
                kept = np.isin(middle, places)
                assert kept.sum() == 300 - 48
                worth = ranked[layer, head][middle]
                assert worth[kept].min() >= worth[~kept].max()


def test_chunks_make_no_difference(load: Load) -> None:
    kept = []
    for chunk in (64, 200, 512):
        kv = {**KV, "chunk": chunk, "storage": "fp32"}
        with load(kv=kv, cache=False).read_text(DOCUMENT) as context:
            kept.append([positions(context, layer) for layer in range(2)])
    for other in kept[1:]:
        same = [np.isin(a, b).mean() for x, y in zip(kept[0], other, strict=True) for a, b in zip(x, y, strict=True)]
        assert min(same) > 0.99  # pairs that are worth the same, to the last digits


def test_a_text_that_fits_is_not_compiled(load: Load) -> None:
    told = Told()
    with load(kv={**KV, "hot_tokens": 2000}, cache=False).read_text(DOCUMENT, progress=told) as context:
        assert list(told.stages) == ["reading"]
        assert cache_of(context).ranked_until == 0
        assert cache_of(context).held_tokens() == context.tokens
        assert context.policy == "kvzip"


# --- conversations


def test_a_conversation_takes_no_room_from_the_document(load: Load) -> None:
    """Turns beyond the budget push out themselves, the oldest first; the window keeps the newest."""
    with load(kv={**KV, "chunk": 64}, cache=False).read_text(DOCUMENT) as context:
        total = context.tokens
        before = [(places, scores(context, 0, head)) for head, places in enumerate(positions(context))]
        for _ in range(4):
            context.ask(QUESTION * 3, max_new_tokens=30, **LIVELY)
        cache_of(context).demote()
        assert context.tokens > total + 400
        for (was, worth), now in zip(before, positions(context), strict=True):
            best = was[8:][np.argsort(-worth[was[8:]], kind="stable")][: 300 - 48]  # its end is no window any more
            assert now[now < total].tolist() == [*range(8), *np.sort(best).tolist()]
            assert now[now >= total].tolist() == list(range(context.tokens - 40, context.tokens))


def test_forks_answer_as_the_first_does(load: Load) -> None:
    with load(cache=False).read_text(DOCUMENT) as context:
        branch = context.fork()
        answers = [each.ask(QUESTION, max_new_tokens=20, **LIVELY).text for each in (context.fork(), branch, context)]
        assert len(set(answers)) == 1


def test_layers_with_a_window_keep_theirs(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "PIECE_TOKENS", 400)
    whole = load({"architecture": "gemma3"}, policy="full", kv={"storage": "fp32"}, cache=False)
    model = load({"architecture": "gemma3"}, kv={**KV, "storage": "fp32"}, cache=False)
    with model.read_text(DOCUMENT) as context, whole.read_text(DOCUMENT) as expected:
        total = context.tokens
        kept = [cache_of(each)._native.read(0, 0) for each in (context, expected)]
        assert kept[0][2][-24:].tolist() == list(range(total - 24, total))
        for got, right in zip(kept[0], kept[1], strict=True):
            np.testing.assert_allclose(got[-24:], right[-24:], atol=1e-5)
        assert cache_of(context)._native.tokens(1, 0) == 300
        assert context.ask(QUESTION, max_new_tokens=5).usage.new_tokens


# --- snapshots


def test_what_was_compiled_is_opened_and_not_compiled_again(load: Load, tmp_path: Path) -> None:
    answers, sizes = [], []
    for reopened in (False, True, True):
        told = Told()
        with load().read_text(DOCUMENT, progress=told) as context:
            assert context.reopened is reopened
            assert bool(told.stages) is not reopened
            answers.append(context.ask(QUESTION, max_new_tokens=40, **LIVELY).text)
        (path,) = snapshots(tmp_path)  # what was only read is gone
        sizes.append(path.stat().st_size)
    assert answers == answers[:1] * 3
    load(policy="full", kv={}).read_text(DOCUMENT).close()
    (other,) = set(snapshots(tmp_path)) - {path}
    assert sizes[0] < 0.4 * other.stat().st_size


@pytest.mark.parametrize("at", [0, 1, 3])
def test_stopped_while_compiling_nothing_that_was_read_is_lost(load: Load, tmp_path: Path, at: int) -> None:
    with load(cache=False).read_text(DOCUMENT) as context:
        expected = context.ask(QUESTION, max_new_tokens=20, **LIVELY).text
    calls = 0

    def stop(stage: str, _done: int, _total: int, /) -> None:
        nonlocal calls
        calls += stage == "compiling"
        if calls > at:
            raise Cancelled("reading was cancelled")

    with pytest.raises(Cancelled):
        load(kv={**KV, "chunk": 256}).read_text(DOCUMENT, progress=stop)
    assert len(snapshots(tmp_path)) == 1
    told = Told()
    with load().read_text(DOCUMENT, progress=told) as context:
        assert list(told.stages) == ["compiling"]
        assert context.reopened
        assert context.ask(QUESTION, max_new_tokens=20, **LIVELY).text == expected
    assert len(snapshots(tmp_path)) == 1
    with load().read_text(DOCUMENT) as context:
        assert context.ask(QUESTION, max_new_tokens=20, **LIVELY).text == expected


def test_an_interrupt_within_a_run(load: Load, tmp_path: Path) -> None:
    """Ctrl-C in a script that has no bar: the same model goes on with what it has read."""
    model = load(kv={**KV, "chunk": 256})
    stopper = Session(model, 7, interrupt)  # five runs read, the others compile
    with pytest.raises(KeyboardInterrupt):
        model.read_text(DOCUMENT)
    stopper.remove()
    assert len(snapshots(tmp_path)) == 1
    told = Told()
    with model.read_text(DOCUMENT, progress=told) as context:
        assert list(told.stages) == ["compiling"]
        assert cache_of(context).held_tokens() == 300


def test_a_cancelled_compilation_leaves_the_text_as_it_was_read(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the middle: all that was read is there, nothing of the second reading."""
    model = load(cache=False)
    ids = model.tokenizer.encode(DOCUMENT)
    with model.open_context(len(ids)) as context:
        context.read_ids(ids, lambda *_: None)
        before = [cache_of(context)._native.read(layer, 1) for layer in range(2)]

        def fail(_stage: str, done: int, _total: int, /) -> None:
            if done:
                raise RuntimeError("a fault")

        with pytest.raises(RuntimeError, match="a fault"):
            context.compile(ids, fail)
        assert context.waits_for_compiling
        assert context.tokens == len(ids)
        for layer in range(2):
            for old, now in zip(before[layer], cache_of(context)._native.read(layer, 1), strict=True):
                np.testing.assert_array_equal(old, now)
        context.compile(ids, lambda *_: None)
        assert cache_of(context).held_tokens() == 300


def test_of_a_longer_text_the_rest_is_read_and_compiled(load: Load, tmp_path: Path) -> None:
    with load().read_text(DOCUMENT) as context:
        first = context.tokens
        before = {(layer, head): scores(context, layer, head) for layer in range(2) for head in range(2)}
    told = Told()
    with load().read_text(DOCUMENT + MORE, progress=told) as context:
        assert context.reopened
        assert told.stages["reading"][0][0] == first
        tail = context.tokens - first
        assert tail < told.stages["compiling"][-1][1] < tail + 250
        assert cache_of(context).held_tokens() == 300
        later = 0
        for (layer, head), old in before.items():
            now, places = scores(context, layer, head), positions(context, layer)[head]
            early = places[places < first]
            assert np.isfinite(old[early]).all()
            np.testing.assert_array_equal(now[early], old[early])
            later += int(((places >= first) & (places < context.tokens - 40)).sum())
        assert later > 0
        assert context.ask(QUESTION, max_new_tokens=5).usage.new_tokens
    assert len(snapshots(tmp_path)) == 2
    with load().read_text(DOCUMENT + MORE, progress=told) as context:
        assert context.tokens == first + tail


def test_a_rest_that_was_read_but_not_compiled_is_kept_too(load: Load, tmp_path: Path) -> None:
    with load().read_text(DOCUMENT) as context:
        first = context.tokens

    def stop(stage: str, _done: int, _total: int, /) -> None:
        if stage == "compiling":
            raise Cancelled("reading was cancelled")

    with pytest.raises(Cancelled):
        load().read_text(DOCUMENT + MORE, progress=stop)
    told = Told()
    with load().read_text(DOCUMENT + MORE, progress=told) as context:
        assert list(told.stages) == ["compiling"]
        assert told.stages["compiling"][-1][1] < context.tokens - first + 250
        assert cache_of(context).ranked_until == context.tokens


def test_other_budgets_are_other_snapshots(load: Load, tmp_path: Path) -> None:
    for more, reopened in (({}, False), ({"head_budgets": "adaptive"}, False), ({"chunk": 64}, True)):
        with load(kv={**KV, **more}).read_text(DOCUMENT) as context:
            assert context.reopened is reopened
    assert len(snapshots(tmp_path)) == 2


# --- limits


def limits(load: Load, tokens: int) -> tuple[int, int]:
    """The least memory that compiling takes, and that of a policy which prunes while it reads."""
    found = []
    for policy in ("kvzip", "recency"):
        with pytest.raises(MemoryLimitError) as caught:
            load(policy=policy, memory=1).plan(tokens)
        found.append(caught.value.smallest_bytes)
    return found[0], found[1]


def test_memory_must_hold_all_of_the_text(load: Load) -> None:
    gguf = {"context_length": 40_000, "layers": 8, "heads": 8, "kv_heads": 8, "head_size": 64}
    model = load(gguf, memory="2GB")
    plan = model.plan(30_000)
    assert (plan.placement, plan.hot_tokens) == ("compiled", 300)
    assert plan.capacity_tokens > 32_000
    small = plan.total_bytes - plan.kv_limit_bytes // 2
    with pytest.raises(MemoryLimitError, match="all of which are held until they are compiled") as caught:
        load(gguf, memory=small).plan(30_000)
    message = str(caught.value)
    assert "would do; raise --memory or use another policy" in message
    assert small < caught.value.smallest_bytes <= 1.05 * plan.total_bytes + (64 << 20)
    assert load(gguf, memory=small, policy="recency").plan(30_000).placement == "pruned"


def test_what_is_compiled_opens_in_less_memory(load: Load) -> None:
    gguf = {"layers": 8, "heads": 8, "kv_heads": 8, "head_size": 64}
    with load(gguf, memory="4GB").read_text(DOCUMENT) as context:
        assert not context.reopened
        held = context.kv["hot_bytes"]
    model = load(gguf)
    small = model.plan(100).total_bytes  # of a text that fits into the budget
    whole = model.plan(context.plan.capacity_tokens + 2000)
    assert held < whole.kv_limit_bytes
    for text, works in ((DOCUMENT, True), (DOCUMENT.upper(), False)):
        model = load(gguf)
        object.__setattr__(model.options, "memory_bytes", int(1.02 * small) + (26 << 20))
        if works:
            with model.read_text(text) as context:
                assert context.reopened
        else:
            with pytest.raises(MemoryLimitError, match="held until they are compiled"):
                model.read_text(text)


def test_pieces_shrink_where_the_context_ends(load: Load) -> None:
    text = DOCUMENT * 3
    told = Told()
    tokens = len(load(cache=False).tokenizer.encode(text))
    with load({"context_length": tokens + 700}, cache=False).read_text(text, progress=told) as context:
        compiled = told.stages["compiling"][-1][1]
        assert compiled > context.tokens + 3 * 100  # requests of several pieces
        assert cache_of(context).held_tokens() == 300
    with pytest.raises(ContextLengthError, match="leave no room to repeat a piece of them"):
        load({"context_length": tokens + 200}, cache=False).read_text(text)


def test_only_as_a_policy() -> None:
    for policy in ("auto", "full", "recency"):
        kv = {"scorer": "kvzip"}
        message = "leave out one of them" if policy == "recency" else "use policy kvzip"
        with pytest.raises(OptionError, match=message):
            Options.check(None, policy, kv, 1, "cpu")
    with pytest.raises(OptionError, match="not available with --engine llama.cpp"):
        Options.check(None, "kvzip", {}, 1, "cpu", engine="llama.cpp")
