"""Head profiles from the settings to the graph: what they cost, that plans count it, and that no answer notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import satchel
from satchel import kernels
from satchel.cache import KVCache
from satchel.cache.head_profiles import ranked_profiles
from satchel.devices.sizes import parse_size
from satchel.errors import ModelError, OptionError
from satchel.export.calibration.files import write_calibration
from satchel.export.calibration.head_scores import SCORES, write_head_scores
from satchel.export.exporter import export_model
from satchel.export.package import Package
from satchel.runtime import Context, Model

Load = Callable[..., Model]
GGUF: dict[str, Any] = {"types": ("Q8_0",), "layers": 6, "context_length": 4096}
SMALL = {"storage": "fp32", "sinks": 64, "window": 48, "chunk": 64}
RECALL = {**SMALL, "hot_tokens": 112, "codec": "f16", "recall_tokens": 4096}
DOCUMENT = "The maintainer uploads. Nobody else may, without consent, in the first week. " * 20
QUESTION = "Who may upload, and when, and what if the maintainer is away? " * 8
LIVELY: dict[str, Any] = {"temperature": 20.0, "seed": 11}
WAYS: list[dict[str, Any]] = [
    {"policy": "full", "kv": SMALL}, {"policy": "auto", "kv": RECALL},
    {"policy": "recency", "kv": {**SMALL, "hot_tokens": 200}}, {"policy": "h2o", "kv": {**SMALL, "hot_tokens": 200}},
]  # fmt: skip
NAMES = [str(way["policy"]) for way in WAYS]


@pytest.fixture
def package(tiny_gguf: Callable[..., Path], tmp_path: Path) -> Package:
    """With scores by which the second KV head of every layer streams."""
    package = export_model(tiny_gguf(**GGUF), tmp_path / "package")
    scores = np.array([[0.9, 0.1]] * 6) + np.arange(6)[:, None] / 100
    write_head_scores(package, "razor", scores, {})
    return package


@pytest.fixture
def load(package: Package, tmp_path: Path) -> Any:
    opened: list[Model] = []

    def make(way: dict[str, Any], heads: str | None = "razor", **options: Any) -> Model:
        kv = way["kv"] | ({"heads": heads} if heads else {})
        arguments: dict[str, Any] = {"threads": 2, "notice": lambda _: None, "cache": False, "cache_dir": tmp_path}
        opened.append(satchel.load(package.folder, **{**arguments, **way, **options, "kv": kv | options.get("kv", {})}))
        return opened[-1]

    yield make
    for model in opened:
        model.close()


def native_of(context: Context) -> kernels.KVCache:
    assert isinstance(context._cache, KVCache)
    return context._cache._native


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_half_of_the_heads_hold_a_window(load: Load, way: dict[str, Any]) -> None:
    found = {}
    for heads, streaming in ((None, ()), ("razor", (1,))):
        model = load(way, heads)
        with model.read_text(DOCUMENT) as context:
            native, kv = native_of(context), context.kv
            for layer in range(6):
                for head in range(2):
                    tokens = native.tokens(layer, head)
                    if head in streaming:
                        assert 64 + 47 <= tokens <= 64 + 48 + 126
                    elif way["policy"] == "full":
                        assert tokens == context.tokens
            assert native.bytes <= context.plan.kv_limit_bytes
            found[heads] = kv["hot_bytes"] if way["policy"] == "full" else kv["warm_bytes"] + kv["digest_bytes"]
            talks = (context.fork(), context) if way["policy"] in ("full", "auto") else (context,)
            answers = {each.ask(QUESTION, max_new_tokens=20, **LIVELY).text for each in talks}
            assert len(answers) == 1
    if way["policy"] == "auto":
        assert 2 * found["razor"] == found[None] > 0
    if way["policy"] == "full":
        assert found["razor"] < 0.6 * found[None]


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_a_question_that_is_stopped_has_not_been(load: Load, way: dict[str, Any]) -> None:
    """It pushes all out of the windows that was there before it."""
    from stopping import Session

    model = load(way)
    with model.read_text(DOCUMENT[:1000]) as context:
        before = context.tokens
        streaming = [native_of(context).positions(layer, 1) for layer in range(6)]
        session = Session(model, 5, context.cancel, after=True)
        assert context.ask(QUESTION, max_new_tokens=4).usage.finish_reason == "cancelled"
        session.remove()
        assert context.tokens == before
        for layer in range(6):
            np.testing.assert_array_equal(native_of(context).positions(layer, 1), streaming[layer])


@pytest.mark.parametrize("heads", ["razor", "hybrid"])
@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_snapshots(load: Load, way: dict[str, Any], heads: str) -> None:
    """Reopened it goes on as it did, and with another profile the text is read again."""
    rows = []
    for reopened in (False, True):
        model = load(way, heads, cache=True)
        with model.read_text(DOCUMENT) as context:
            assert context.reopened is reopened
            rows.append(context.append(context._turn_ids(QUESTION)))
    np.testing.assert_array_equal(rows[0], rows[1])
    another = {"heads": "hybrid" if heads == "razor" else "razor"}
    for other in ({}, another, {"heads": "razor", "streaming_heads": 25}, {"heads": heads, "window": 50}):
        room = {} if way["policy"] == "full" else {"hot_tokens": 200}
        with load(way, None, cache=True, kv=other | room).read_text(DOCUMENT) as context:
            assert not context.reopened


def test_a_text_that_parts_from_a_saved_one_early_is_read_again(load: Load) -> None:
    load(WAYS[0], cache=True).read_text(DOCUMENT).close()
    with load(WAYS[0], cache=True).read_text(DOCUMENT[:700] + "But then, who knows? " * 10) as context:
        assert not context.reopened


@pytest.mark.parametrize("heads", ["razor", "hybrid"])
@pytest.mark.parametrize("budget", ["600KB", "800KB"])
def test_what_was_planned_is_enough(load: Load, budget: str, heads: str) -> None:
    """For long questions, and a fork beside what it was forked from, which stays inside the budget."""
    model = load({"kv": {"budget_bytes": budget, "window": 48}}, heads)
    with model.read_text(DOCUMENT * 2) as context:
        assert context.policy == "recall"
        branch = context.fork()
        for seed in range(3):
            for talk in (branch, context) if seed == 2 else (branch,):
                usage = talk.ask(QUESTION, max_new_tokens=100, temperature=20.0, seed=seed).usage
                assert usage.finish_reason in ("stop", "length")
                assert talk._cache.usage().memory_bytes <= parse_size(budget)


def test_plans_count_streaming_heads(load: Load) -> None:
    whole, half, all_but_none = (
        load({"policy": "full", "kv": SMALL}, heads, **options).plan(3000)
        for heads, options in ((None, {}), ("razor", {}), ("razor", {"kv": {"streaming_heads": 100}}))
    )
    page = whole.kv_limit_bytes // (12 * -(-(3000 + whole.chunk) // 64))
    assert half.window_bytes > 0 == whole.window_bytes
    assert half.kv_limit_bytes - half.window_bytes == 6 * page * -(-(3000 + half.chunk) // 64)
    assert all_but_none.kv_limit_bytes == all_but_none.window_bytes == 2 * half.window_bytes


def test_all_heads_may_stream(load: Load) -> None:
    """There is nothing to archive then."""
    model = load({"policy": "auto", "kv": SMALL}, kv={"streaming_heads": 100})
    with model.read_text(DOCUMENT) as context:
        assert context.kv["hot_tokens"] <= 64 + 48 + 126 < context.tokens
        assert context.ask(QUESTION, max_new_tokens=10, **LIVELY).usage.new_tokens > 0


def test_no_percent_is_no_profile(load: Load) -> None:
    with load({"policy": "full", "kv": SMALL}, kv={"streaming_heads": 0}) as model:
        assert model.engine.streaming is None


def test_layers_with_a_window_are_left_alone(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    gguf = {**GGUF, "architecture": "gemma3", "layers": 4, "metadata": {".attention.sliding_window": 100}}
    package = export_model(tiny_gguf(**gguf), tmp_path / "package")
    with satchel.load(package.folder, policy="full", kv={**SMALL, "heads": "hybrid"}, cache=False) as model:
        assert model.engine.streaming is not None
        marks, windows = model.engine.streaming.heads, package.spec.attention_windows
        assert [all(layer) for layer in marks] == [any(layer) for layer in marks]
        assert not any(any(layer) for layer, window in zip(marks, windows, strict=True) if window)
        assert model.engine.streaming.count == 2  # of two layers that see everything, one
        with model.read_text(DOCUMENT) as context:
            assert native_of(context).bytes <= context.plan.kv_limit_bytes


# --- refusals


@pytest.mark.parametrize("name", ranked_profiles())
def test_a_package_must_be_calibrated(name: str, tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    package = export_model(tiny_gguf(**GGUF), tmp_path / "package")

    def load() -> None:
        satchel.load(package.folder, kv={"heads": name}).close()

    with pytest.raises(ModelError, match=f"no calibration for {name}; make it once: satchel calibrate MODEL --method"):
        load()
    write_calibration(package, name, {SCORES: np.zeros((6, 3), np.float32)}, {})
    with pytest.raises(ModelError, match=r"has no head_scores of shape \(6, 2\)"):
        load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv": {"heads": "lazy"}}, "heads='lazy' is not known; choose one of all, razor, duo, hybrid"),
        ({"kv": {"heads": "razor", "streaming_heads": 101}}, "streaming_heads=101 is not a percentage of KV heads"),
        ({"kv": {"heads": "razor", "streaming_heads": "half"}}, "streaming_heads='half' is not a percentage"),
        ({"kv": {"streaming_heads": 50}}, "heads=all does not; leave it out or set heads to one of razor, duo"),
        ({"kv": {"heads": "hybrid", "streaming_heads": 50}}, "heads=hybrid does not"),
        ({"engine": "llama.cpp", "kv": {"heads": "razor"}}, "kv heads is not for --engine llama.cpp, whose KV heads"),
    ],
)
def test_what_is_refused(package: Package, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        satchel.load(package.folder, **arguments)
