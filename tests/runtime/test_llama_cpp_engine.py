"""The engine llama.cpp on tiny models: it computes what our own does, and keeps the same promises."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import satchel
from satchel.cache.scorers import scorer_names
from satchel.cache.scorers.base import rotate
from satchel.cache.snapshots import SnapshotStore
from satchel.errors import MemoryLimitError, ModelError, OptionError, SatchelError
from satchel.export.gguf_writer import export_gguf
from satchel.export.resolve import resolve_model
from satchel.runtime import Model
from satchel.runtime.engines import Cancelled
from tiny_folders import write_tiny_folder

pytest.importorskip("llama_cpp", reason="needs the extra llama-cpp")
from satchel.runtime.engines.llama_cpp import engine as engine_module
from satchel.runtime.engines.llama_cpp.library import LlamaContext

Floats = npt.NDArray[np.float32]
Load = Callable[..., Model]
TINY: dict[str, Any] = {"types": ("Q8_0",), "hidden": 128, "output": "separate"}
ONE_HEAD: dict[str, Any] = {**TINY, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 64}
IDS = [int(token) for token in np.random.default_rng(0).integers(0, 256, 900)]
DOCUMENT = "The maintainer uploads. Nobody else may, without consent, in the first week. " * 20
QUESTION = "Who may upload?"
SMALL: dict[str, Any] = {"hot_tokens": 256, "window": 64, "sinks": 4, "chunk": 64}
LARGEST_RMS = 0.04  # of the logits' spread: llama.cpp rounds activations to 8 bits
SAME_RMS = 0.03  # of one engine with its cells and batches in another order: the order of sums


@pytest.fixture
def load_llama(load_tiny: Load) -> Load:
    """``load_tiny`` with this engine, and a model whose answers are lively."""

    def load(gguf: dict[str, Any] | None = None, **arguments: Any) -> Model:
        return load_tiny(gguf or TINY, **{"engine": "llama.cpp", "cache": False, "threads": 1, **arguments})

    return load


def rms(found: Floats, expected: Floats) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


def read(model: Model, ids: Sequence[int] = IDS) -> Any:
    """A conversation that has read ``ids``, and the logits after them."""
    context = model.open_context(len(ids))
    row = context.prefill(ids, lambda *_: None)
    return context, row


# --- The same figures as our own engine


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
def test_logits_are_those_of_the_native_engine(load_llama: Load, load_tiny: Load, architecture: str) -> None:
    model = {**TINY, "architecture": architecture}
    ours = load_tiny(model, policy="full", kv={"storage": "fp32"}, cache=False)
    theirs = load_llama(model, policy="full")
    for count in (1, 90, 512, 513, 900):
        assert rms(theirs.last_logits(IDS[:count]), ours.last_logits(IDS[:count])) < LARGEST_RMS


@pytest.mark.parametrize("storage", ["q8_0", "q4_0"])
def test_quantized_keys_and_values_take_less_and_say_nearly_the_same(load_llama: Load, storage: str) -> None:
    plain, _ = read(load_llama())
    packed, row = read(load_llama(kv={"storage": storage}))
    assert packed.kv["hot_bytes"] == plain.kv["hot_bytes"] * {"q8_0": 34, "q4_0": 18}[storage] // 64
    assert 0 < rms(row, load_llama().last_logits(IDS)) < {"q8_0": 0.05, "q4_0": 0.6}[storage]


@pytest.mark.parametrize("policy", ["recency", "keydiff", "snapkv"])
def test_what_is_evicted_is_what_our_engine_evicts(load_llama: Load, load_tiny: Load, policy: str) -> None:
    """With one layer and one KV head there is nothing to average over."""
    ours, row = read(load_tiny(ONE_HEAD, policy=policy, kv={**SMALL, "storage": "fp32"}, cache=False))
    theirs, other = read(load_llama(ONE_HEAD, policy=policy, kv=SMALL))
    kept = set(ours._cache._native.positions(0, 0).tolist())
    assert len(kept) == ours.kv["hot_tokens"] == theirs.kv["hot_tokens"] == SMALL["hot_tokens"]
    common = kept & set(theirs._cache.positions.tolist())
    assert len(common) >= (len(kept) if policy == "recency" else 0.85 * len(kept))  # rounding turns near ties
    if policy == "recency":
        assert rms(other, row) < LARGEST_RMS
    else:
        assert kept != set(range(900 - len(kept), 900))


def test_observed_keys_and_queries_are_those_of_our_engine(load_llama: Load, load_tiny: Load) -> None:
    ours, _ = read(load_tiny(TINY, policy="snapkv", kv={"hot_tokens": 500, "storage": "fp32"}, cache=False), IDS[:90])
    theirs, _ = read(load_llama(policy="snapkv", kv={"hot_tokens": 500}), IDS[:90])
    cache = theirs._cache
    for layer in range(2):
        keys = theirs._model.engine.observer.keys(layer, cache.observed.cells)
        for head in range(2):
            assert rms(keys[head], ours._cache._native.read(layer, head)[0]) < LARGEST_RMS
        queries, positions = ours._cache._native.observed(layer)
        assert cache.observed.query_positions.tolist() == positions.tolist()
        turned = rotate(queries, positions, ours._cache._native.frequencies(layer))
        assert rms(cache.observed.queries[layer], turned) < LARGEST_RMS


# --- Conversations


def test_recency_keeps_sinks_and_window_at_their_positions(load_llama: Load) -> None:
    context, _ = read(load_llama(policy="recency", kv=SMALL))
    window = SMALL["hot_tokens"] - SMALL["sinks"]
    assert context._cache.positions.tolist() == [0, 1, 2, 3, *range(900 - window, 900)]
    assert context.kv["total_tokens"] == 900
    engine = context._model.engine
    assert engine._context.last_position(context._cache.sequence) == 899
    in_llama_cpp = engine._context.state_bytes(context._cache.sequence) / engine.cell_bytes(context._cache.settings)
    assert SMALL["hot_tokens"] < in_llama_cpp < SMALL["hot_tokens"] + 10
    context.append([5])
    assert context._cache.positions[-1] == 900


def test_forks_do_not_see_each_other(load_llama: Load) -> None:
    model = load_llama()
    base, _ = read(model, IDS[:300])
    one, other = base.fork(), base.fork()
    one.append(IDS[300:360])
    expected = model.last_logits(IDS[:300] + IDS[700:720])
    assert rms(other.append(IDS[700:720]), expected) < SAME_RMS
    one.close()
    assert rms(base.append(IDS[300:400]), model.last_logits(IDS[:400])) < SAME_RMS
    assert other.tokens == 320


@pytest.mark.parametrize("policy", ["recency", "snapkv"])
def test_a_fork_that_is_pruned_leaves_the_others_whole(load_llama: Load, policy: str) -> None:
    model = load_llama(policy=policy, kv={**SMALL, "hot_tokens": 400})
    base, _ = read(model, IDS[:390])
    fork = base.fork()
    fork._cache.demote(100)
    assert fork.kv["hot_tokens"] == 100
    assert base.kv["hot_tokens"] == 390
    assert rms(base.append(IDS[390:400]), model.last_logits(IDS[:400])) < SAME_RMS


@pytest.mark.parametrize("options", [{}, {"policy": "snapkv", "kv": {"hot_tokens": 2000}}], ids=["auto", "snapkv"])
def test_a_cancelled_run_leaves_no_trace(
    load_llama: Load, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    model = load_llama(**options)
    context, _ = read(model, IDS[:200])
    before = context._cache.observed
    decode, calls = LlamaContext.decode, list[int]()

    def stopped(self: LlamaContext, ids: Sequence[int], *arguments: Any, **more: Any) -> int:
        calls.append(len(ids))
        if len(calls) == 2:  # the first batch of the run is in the cache
            model.engine.cancel(context._cache)
        return decode(self, ids, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaContext, "decode", stopped)
        with pytest.raises(Cancelled):
            model.engine.run(IDS[200:], context._cache)
    assert calls == [512, 188]
    assert (context.tokens, context.kv["hot_tokens"]) == (200, 200)
    if before is not None:
        assert np.array_equal(context._cache.observed.queries, before.queries)
        assert len(context._cache.observed.cells) == 200
    assert rms(context.append(IDS[200:300]), model.last_logits(IDS[:300])) < SAME_RMS


def test_cancel_when_nothing_runs_is_no_error(load_llama: Load) -> None:
    model = load_llama()
    model.engine.cancel()
    context, _ = read(model, IDS[:20])
    model.engine.cancel(context._cache)
    assert context.append([3]).size == 300


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_what_is_forgotten_was_never_read(load_llama: Load, architecture: str) -> None:
    model = load_llama({**TINY, "architecture": architecture})
    context, _ = read(model, IDS[:300])
    fork = context.fork()
    fork.append(IDS[500:600])
    fork._cache.forget_from(100)
    assert (fork.tokens, fork.kv["hot_tokens"]) == (100, 100)
    assert rms(fork.append(IDS[100:160]), model.last_logits(IDS[:160])) < SAME_RMS
    assert rms(context.append(IDS[300:310]), model.last_logits(IDS[:310])) < SAME_RMS


@pytest.mark.parametrize("policy", ["full", "keydiff", "snapkv"])
def test_a_context_that_is_full_is_made_larger(
    load_llama: Load, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    options: dict[str, Any] = {} if policy == "full" else {"kv": {"hot_tokens": 600, "chunk": 64}}
    roomy, expected = read(load_llama(policy=policy, **options), IDS[:700])
    monkeypatch.setattr(engine_module, "FIRST_CELLS", 256)
    model = load_llama(policy=policy, **options)
    base, _ = read(model, IDS[:200])
    assert model.engine._context.cells == 512  # type: ignore[attr-defined]
    fork = base.fork()
    row = fork.prefill(IDS[200:700], lambda *_: None)
    assert model.engine._context.cells in (768, 1024)  # type: ignore[attr-defined]
    kept, expected_kept = set(fork._cache.positions.tolist()), set(roomy._cache.positions.tolist())
    assert len(kept) == len(expected_kept)
    assert len(kept & expected_kept) >= 0.9 * len(kept)  # near ties of the scores
    assert policy != "full" or rms(row, expected) < SAME_RMS
    assert base.kv["hot_tokens"] == 200
    assert rms(base.append(IDS[200:210]), model.last_logits(IDS[:210])) < SAME_RMS


def test_keys_are_found_where_they_are_after_a_move(load_llama: Load) -> None:
    model = load_llama(policy="keydiff", kv={**SMALL, "hot_tokens": 300})
    engine: Any = model.engine
    other, _ = read(model, IDS[500:550])
    base, _ = read(model, IDS[:200])
    other.close()  # leaves a gap before the cells of the others
    fork = base.fork()
    fork.append(IDS[200:260])
    fork._cache.demote(150)
    caches = [base._cache, fork._cache]
    before = [engine.observer.keys(layer, cache.observed.cells) for cache in caches for layer in (0, 1)]
    engine._reopen(model.options.settings, 2048)
    after = [engine.observer.keys(layer, cache.observed.cells) for cache in caches for layer in (0, 1)]
    assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))
    assert rms(base.append(IDS[200:210]), model.last_logits(IDS[:210])) < SAME_RMS


def test_cells_are_given_back(load_llama: Load) -> None:
    model = load_llama()
    contexts = [read(model, IDS[:30])[0] for _ in range(16)]
    with pytest.raises(OptionError, match=r"16 conversations at once, and all are open; close one"):
        read(model, IDS[:30])
    contexts.pop().close()
    read(model, IDS[:30])[0].close()
    contexts.pop()  # dropped, not closed
    gc.collect()
    read(model, IDS[:30])[0].close()
    for context in contexts:
        context.close()
        context.close()
    del context
    gc.collect()
    assert model.engine._context is None  # type: ignore[attr-defined]
    with pytest.raises(SatchelError, match="closed"):
        contexts[0].append([1])


# --- Snapshots

KINDS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "q8_0": {"kv": {"storage": "q8_0"}},
    "recency": {"policy": "recency", "kv": SMALL},
    "keydiff": {"policy": "keydiff", "kv": SMALL},
    "snapkv": {"policy": "snapkv", "kv": SMALL},
    "windows": {"gguf": {**TINY, "architecture": "gemma3"}},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@kinds
def test_a_reopened_document_answers_as_before(load_llama: Load, tmp_path: Path, options: dict[str, Any]) -> None:
    found, rows = [], []
    for reopened in (False, True):
        model = load_llama(cache=True, cache_dir=tmp_path, **options)
        with model.read_text(DOCUMENT) as context:
            assert context.reopened is reopened
            cache, engine = context._cache, model.engine
            keys = [] if engine.observer is None else [engine.observer.keys(n, cache.observed.cells) for n in (0, 1)]
            asked = [] if cache.observed is None else [cache.observed.queries]
            found.append((cache.positions.tolist(), [part.tobytes() for part in (*keys, *asked) if part is not None]))
            with context.fork() as fork:
                rows.append(fork.append(IDS[:40]))
            for first in range(0, 256, 64):  # which prunes
                row = context.append(IDS[first : first + 64])
            rows += [row, context._cache.positions]
    assert found[0] == found[1]
    assert rms(rows[3], rows[0]) < SAME_RMS
    assert rms(rows[4], rows[1]) < SAME_RMS
    assert np.mean(rows[2] != rows[5]) < 0.02  # near ties of the scores
    if len(KINDS["full"]) == len(options):  # the cells are in the same order: the same sums
        assert np.array_equal(rows[3], rows[0])
    (entry,) = SnapshotStore(tmp_path / "snapshots").list()
    assert not entry.problem
    assert not list((tmp_path / "packages").glob("satchel-state-*"))


def test_of_a_longer_document_only_the_tail_is_read(load_llama: Load, tmp_path: Path) -> None:
    with load_llama(cache=True, cache_dir=tmp_path).read_text(DOCUMENT) as context:
        known = context.tokens
    starts = list[int]()
    longer = DOCUMENT[:-200] + "Only a team may. " * 40
    model = load_llama(cache=True, cache_dir=tmp_path)
    with model.read_text(longer, progress=lambda _s, done, _t: starts.append(done)) as context:
        assert context.reopened
        assert known * 0.8 < starts[0] < known
        answer = context.ask(QUESTION, max_new_tokens=12).text
    with load_llama(cache=False).read_text(longer) as context:
        assert context.ask(QUESTION, max_new_tokens=12).text == answer


def test_a_windowed_state_is_opened_whole_or_not_at_all(load_llama: Load, tmp_path: Path) -> None:
    """llama.cpp saves no more of a windowed layer than its window."""
    options: dict[str, Any] = {"gguf": {**TINY, "architecture": "gemma3"}, "cache": True, "cache_dir": tmp_path}
    load_llama(**options).read_text(DOCUMENT).close()
    with load_llama(**options).read_text(DOCUMENT[:-200] + "Only a team may. " * 40) as context:
        assert not context.reopened


@pytest.mark.parametrize("storage", ["f16", "q8_0"])
def test_snapshots_are_of_one_engine_and_storage(
    load_llama: Load, load_tiny: Load, tmp_path: Path, storage: str
) -> None:
    load_tiny(TINY, cache_dir=tmp_path).read_text(DOCUMENT).close()
    load_llama(cache=True, cache_dir=tmp_path, kv={"storage": storage}).read_text(DOCUMENT).close()
    other = {"f16": "q8_0", "q8_0": "f16"}[storage]
    with load_llama(cache=True, cache_dir=tmp_path, kv={"storage": other}).read_text(DOCUMENT) as context:
        assert not context.reopened


def forged(name: str, change: Callable[[bytearray], Any]) -> Callable[..., Path]:
    """A `SnapshotStore.save` that writes a section changed, with right checksums."""
    original = SnapshotStore.save

    def save(self: SnapshotStore, subject: Any, ids: Any, sections: Any, **more: Any) -> Path:
        changed = []
        for section, pieces, coding in sections:
            data = bytearray(b"".join(bytes(piece) for piece in pieces))
            if section == name:
                change(data)
            changed.append((section, [bytes(data)], coding))
        return original(self, subject, ids, changed, **{**more, "bytes_needed": 0})

    return save


def poke(at: int, value: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at : at + 4] = value.to_bytes(4, "little")

    return change


def shorten(data: bytearray) -> None:
    del data[-1000:]


def lengthen(data: bytearray) -> None:
    data += bytes(1000)


def empty(data: bytearray) -> None:
    data.clear()


CELLS = SMALL["hot_tokens"]
FORGERIES: dict[str, tuple[str, Callable[[bytearray], Any]]] = {
    "magic": ("state", poke(0, 1)), "version": ("state", poke(4, 99)), "streams": ("state", poke(12, 7)),
    "more cells": ("state", poke(16, 1 << 30)), "fewer cells": ("state", poke(16, 3)),
    "position": ("state", poke(20, 1 << 28)), "cut": ("state", shorten), "longer": ("state", lengthen),
    "empty": ("state", empty), "twice": ("positions", poke(0, 1)), "negative": ("positions", poke(0, 1 << 31)),
    "late": ("positions", poke(0, 1 << 20)), "none": ("positions", empty), "odd": ("positions", bytearray.pop),
    "type": ("state", poke(20 + 12 * CELLS + 8, 2)), "row": ("state", poke(20 + 12 * CELLS + 12, 1 << 20)),
    "layers": ("state", poke(20 + 12 * CELLS + 4, 200)), "transposed": ("state", poke(20 + 12 * CELLS, 1)),
    "queries": ("queries", shorten), "not a number": ("queries", poke(40, 0x7FC00000)),
    "asked": ("query-positions", empty),
}  # fmt: skip


@pytest.mark.parametrize(("section", "change"), FORGERIES.values(), ids=FORGERIES)
def test_a_forged_snapshot_is_refused_and_told_of(
    load_llama: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, change: Callable[[bytearray], Any]
) -> None:
    options: dict[str, Any] = {"cache": True, "cache_dir": tmp_path, "policy": "snapkv", "kv": SMALL}
    with monkeypatch.context() as patch:
        patch.setattr(SnapshotStore, "save", forged(section, change))
        load_llama(**options).read_text(DOCUMENT).close()
    notices = list[str]()
    with load_llama(notice=notices.append, **options).read_text(DOCUMENT) as context:
        assert not context.reopened
        assert context.ask(QUESTION, max_new_tokens=3).usage.new_tokens
    assert any("cannot be used" in line for line in notices)


def test_a_damaged_snapshot_is_read_again(load_llama: Load, tmp_path: Path) -> None:
    load_llama(cache=True, cache_dir=tmp_path).read_text(DOCUMENT).close()
    (path,) = (tmp_path / "snapshots").rglob("*.satchel")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    notices = list[str]()
    with load_llama(cache=True, cache_dir=tmp_path, notice=notices.append).read_text(DOCUMENT) as context:
        assert not context.reopened
    assert any("altered" in line for line in notices)


# --- What is refused


def test_too_little_memory_names_a_limit_that_works(load_llama: Load) -> None:
    with pytest.raises(MemoryLimitError, match=r"of memory is too little for") as caught:
        load_llama(memory="20MB").read_text(DOCUMENT)
    smallest = caught.value.smallest_bytes
    model = load_llama(memory=smallest + (8 << 20))  # this process goes on growing a bit
    with model.read_text(DOCUMENT) as context:
        assert context.ask(QUESTION, max_new_tokens=3).usage.new_tokens == 3
    with pytest.raises(MemoryLimitError, match="budget_bytes=1KB is too little"):
        load_llama(kv={"budget_bytes": "1KB"}).read_text(DOCUMENT)


def test_auto_keeps_everything_while_it_fits_and_then_the_newest(load_llama: Load) -> None:
    with load_llama().read_text(DOCUMENT) as context:
        assert (context.policy, context.kv["hot_tokens"]) == ("full", context.tokens)
    with load_llama(kv={"budget_bytes": "1.5MB", "sinks": 4, "window": 64}).read_text(DOCUMENT) as context:
        assert context.policy == "recency"
        assert context.kv["hot_tokens"] < context.tokens
        assert context._cache.positions[:5].tolist() != [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "vllm"}, "engine 'vllm' is not known; choose native or llama.cpp"),
        ({"kv": {"codec": "q8"}}, "kv codec is not for --engine llama.cpp, .* use --engine native"),
        ({"kv": {"retriever": "none"}}, "kv retriever is not for --engine llama.cpp"),
        ({"kv": {"recall_tokens": 16}}, "kv recall_tokens is not for"),
        ({"kv": {"recall_every": 2}}, "kv recall_every is not for"),
        ({"kv": {"reach": 4096}}, "kv reach is not for"),
        ({"disk": "1GB"}, "--disk is not for --engine llama.cpp"),
        *(
            ({"policy": name}, f"{name} is not available .* recency, keydiff, snapkv")
            for name in sorted(set(scorer_names()) - {"recency", "keydiff", "snapkv"})
        ),
        ({"policy": "keydiff", "kv": {"head_budgets": "adaptive"}}, "kv head_budgets is not for .*, which evicts"),
        ({"policy": "keydiff", "kv": {"merge": "lookm"}}, "kv merge is not for .*, which evicts whole tokens"),
        ({"kv": {"scorer": "expected-attention"}}, "expected-attention is not available"),
        ({"kv": {"storage": "bf16"}}, "kv storage='bf16' is not supported; choose one of f16, q8_0, q4_0"),
        ({"kv": {"storage": "q8_0"}, "engine": "native"}, "kv storage='q8_0' is not supported; choose one of bf16"),
        ({"kv": {"slots": 1}}, "kv setting 'slots' is not known"),
    ],
)
def test_settings_without_a_meaning_are_refused(load_llama: Load, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load_llama(**arguments)


def test_what_does_not_fit_the_model_is_refused(load_llama: Load) -> None:
    with pytest.raises(OptionError, match="blocks of 32 numbers, which do not fit heads of 16; use storage=f16"):
        load_llama({"types": ("Q8_0",)}, kv={"storage": "q8_0"}).read_text(DOCUMENT)
    with pytest.raises(OptionError, match="keydiff is not available .* for models with sliding windows"):
        load_llama({**TINY, "architecture": "gemma3"}, policy="keydiff").read_text(DOCUMENT)


def test_a_missing_library_is_named(load_llama: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = lambda name, *more: None if name == "llama_cpp" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(OptionError, match=r'needs llama-cpp-python, .* pip install "satchel\[llama-cpp\]"'):
        load_llama()


# --- Packages


@pytest.fixture
def gguf(tiny_gguf: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_gguf(**TINY).read_bytes())
    return path


def open_model(path: Path, cache: Path, **arguments: Any) -> Model:
    return satchel.load(path, cache_dir=cache, cache=False, threads=1, **{"engine": "llama.cpp", **arguments})


def test_a_package_links_to_the_file(gguf: Path, tmp_path: Path) -> None:
    package = resolve_model(gguf, cache_dir=tmp_path / "cache", linked=True)
    assert sorted(path.name for path in package.folder.iterdir()) == ["satchel.json", "tokenizer.json"]
    assert (package.linked_file, package.weight_bytes) == (gguf, gguf.stat().st_size)
    assert resolve_model(gguf, cache_dir=tmp_path / "cache", linked=True) == package
    native = resolve_model(gguf, cache_dir=tmp_path / "cache")
    assert native.fingerprint != package.fingerprint
    with open_model(package.folder, tmp_path / "cache") as model:
        assert model.last_logits(IDS[:5]).size == 300
    with pytest.raises(ModelError, match=r"has no weights of its own, .* give the \.gguf file"):
        open_model(package.folder, tmp_path / "cache", engine="native")
    with pytest.raises(ModelError, match=r"package for Satchel's own kernels, .* give the \.gguf file"):
        open_model(native.folder, tmp_path / "cache")


def test_a_file_that_was_changed_or_moved_is_refused(gguf: Path, tmp_path: Path) -> None:
    package = resolve_model(gguf, cache_dir=tmp_path / "cache", linked=True)
    moved = gguf.rename(tmp_path / "moved.gguf")
    with pytest.raises(ModelError, match=r"was made of .*model\.gguf, which is not there any more; give the path"):
        open_model(package.folder, tmp_path / "cache")
    with open_model(moved, tmp_path / "cache") as model:  # found by its content, linked anew
        assert model.package.linked_file == moved
    gguf.write_bytes(moved.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"is not a valid GGUF file|reaches past"):
        open_model(gguf, tmp_path / "cache")
    other = resolve_model(moved, cache_dir=tmp_path / "cache", linked=True)
    data = bytearray(moved.read_bytes())
    data[-5] ^= 1
    moved.write_bytes(data)
    with pytest.raises(ModelError, match=r"moved\.gguf, which was changed since; give the path"):
        open_model(other.folder, tmp_path / "cache")


def test_folders_are_to_be_exported_first(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "hf")
    with pytest.raises(ModelError, match=r"satchel export .*hf model\.gguf --format gguf"):
        open_model(folder, tmp_path / "cache")
    with pytest.raises(ModelError, match=r"satchel export org/name model\.gguf --format gguf"):
        satchel.load("org/name", engine="llama.cpp", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("engine", ["native", "llama.cpp"])
def test_settings_in_the_file_are_defaults(gguf: Path, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "out.gguf"
    settings: dict[str, int | str] = {"sinks": 7, "window": 100, "codec": "q8", "hot_tokens": 300, "storage": "q8_0"}
    export_gguf(gguf, out, kv=settings)
    told = list[str]()
    with open_model(out, tmp_path / "cache", engine=engine, kv={"window": 90}, notice=told.append) as model:
        found = model.options.settings
        assert (found.sinks, found.window, found.hot_tokens) == (7, 90, 300)
        if engine == "native":
            assert (found.codec, found.storage) == ("q8", "bf16")
            assert "settings of the model's file: codec=q8, hot_tokens=300, sinks=7 (--kv overrides them)" in told
            assert any("do not apply here: storage=q8_0" in line for line in told)
        else:
            assert (found.codec, found.storage) == (None, "q8_0")
            assert any("do not apply here: codec=q8" in line for line in told)
    with open_model(out, tmp_path / "cache", engine=engine, policy="full", notice=told.append) as model:
        assert model.options.settings.hot_tokens is None
        assert any("do not apply here:" in line and "hot_tokens=300" in line for line in told)


def test_nonsense_in_the_file_is_told_of_and_left_out(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"satchel.kv.window": "many", "satchel.kv.slots": 4, "satchel.kv.sinks": 9, "satchel.kv.codec": 3.5}
    told = list[str]()
    with open_model(tiny_gguf(**TINY, metadata=keys), tmp_path, engine="native", notice=told.append) as model:
        assert (model.options.settings.sinks, model.options.settings.window) == (9, 256)
    assert any("do not apply here: slots=4, window=many" in line for line in told)


def test_a_package_from_before_the_settings_were_read_is_made_anew(gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    export_gguf(gguf, out, kv={"sinks": 7})
    package = resolve_model(out, cache_dir=tmp_path / "cache")
    manifest = package.folder / "satchel.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"kv"', '"was_not_there"'))
    assert resolve_model(out, cache_dir=tmp_path / "cache").manifest.kv == {"sinks": 7}
    assert manifest.read_text() == text
