"""Retention heads in the graph: what they say reaches the cache, decides what stays, and costs what the plan says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import satchel
from satchel import kernels
from satchel.cache import CacheSettings
from satchel.errors import ModelError, OptionError
from satchel.export.calibration.files import write_calibration
from satchel.export.calibration.retention import (
    ATTENTION_GATE,
    BIAS,
    INNER,
    INNER_BIAS,
    KEY,
    KEY_BIAS,
    LOCRET,
    MIXED,
    NOBODY,
    OUTER,
    OUTER_BIAS,
    QUERY,
    QUERY_BIAS,
    VALUE,
    VALUE_BIAS,
    WEIGHT,
    open_retention,
    retention_shapes,
    write_retention,
)
from satchel.export.exporter import export_model
from satchel.export.package import Package
from satchel.runtime.engines import NativeEngine

RNG = np.random.default_rng(4)
IDS = [int(index) for index in RNG.integers(3, 250, 90)]
CHUNK_STARTS = (0, 50, 89)  # the last token is read alone
KVZAP = CacheSettings(scorer="kvzap", storage="fp32")
TEXT = "The filter is cleaned every second week, says the manual of the pump in room 7. " * 40


@pytest.fixture
def calibrated(tiny_gguf: Callable[..., Path], tmp_path: Path) -> Callable[..., Package]:
    """``calibrated(**options of write_tiny_gguf)``: a package with random heads."""

    def make(**options: Any) -> Package:
        package = export_model(tiny_gguf(**{"context_length": 4096, **options}), tmp_path / "package")
        spec = package.spec
        weights = RNG.normal(size=(spec.layers, spec.kv_heads, spec.hidden)).astype(np.float32)
        write_retention(package, "kvzap", weights, RNG.normal(size=weights.shape[:2]).astype(np.float32), {})
        for method in (LOCRET, ATTENTION_GATE):
            shapes = retention_shapes(spec, method)
            tensors = {
                name.format(layer): (RNG.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)
                for layer in range(spec.layers) for name, shape in shapes.items()
            }  # fmt: skip
            for layer in range(spec.layers if method == ATTENTION_GATE else 0):
                tensors[NOBODY.format(layer)] += 4  # worth as much as all others
            write_calibration(package, method, tensors, {})
        return package

    return make


def scores_of(cache: Any) -> list[Any]:
    shape = cache.shape
    return [cache._native.retention(layer, head) for layer in range(shape.layers) for head in range(shape.kv_heads)]


class Activations:
    """What the attention of each layer works on."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def enter(self, activations: Any) -> None:
        self.found.append(activations)

    def attended(self, *_: Any) -> None: ...


def linear(seen: Any, tensors: Any) -> Any:
    at = seen.layer
    return seen.inputs.numpy() @ tensors[WEIGHT.format(at)].T + tensors[BIAS.format(at)]


def joined_parts(seen: Any) -> Any:
    return np.concatenate([part.flatten(1).numpy() for part in (seen.queries, seen.keys, seen.values)], axis=1)


def network(seen: Any, tensors: Any, found: Any = 0) -> Any:
    inner, inner_bias, outer, outer_bias = (
        tensors[name.format(seen.layer)] for name in (INNER, INNER_BIAS, OUTER, OUTER_BIAS)
    )
    inside = joined_parts(seen) @ inner.T + inner_bias + found
    return inside / (1 + np.exp(-inside)) @ outer.T + outer_bias


def gate(seen: Any, tensors: Any) -> Any:
    """Token by token: its query meets the keys of the others in its chunk, and the one that nobody has."""
    query, query_bias, key, key_bias, value, value_bias, nobody, mixed = (
        tensors[name.format(seen.layer)]
        for name in (QUERY, QUERY_BIAS, KEY, KEY_BIAS, VALUE, VALUE_BIAS, NOBODY, MIXED)
    )
    joined, found = joined_parts(seen), []
    for token in range(len(joined)):
        first = max(place for place in CHUNK_STARTS if place <= token)
        end = min((place for place in CHUNK_STARTS if place > token), default=len(joined))
        others = [place for place in range(first, end) if place != token]
        logits = (joined[others] @ key.T + key_bias) @ (query @ joined[token] + query_bias)
        weights = np.exp(logits)
        shares = weights / (weights.sum() + np.exp(nobody))
        found.append(mixed @ (shares @ (joined[others] @ value.T + value_bias)))
    return network(seen, tensors, np.stack(found))


@pytest.mark.filterwarnings("default")  # torch warns about itself
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3", "olmo2", "phi3"])
@pytest.mark.parametrize(
    ("method", "expected_of"), [("kvzap", linear), ("locret", network), ("attention-gate", gate)]
)
def test_the_graph_says_what_the_heads_say(
    method: str, expected_of: Callable[..., Any], architecture: str, calibrated: Callable[..., Package]
) -> None:
    pytest.importorskip("torch", reason="needs the extra 'calibrate'")
    from satchel.export.calibration.decoder import Decoder

    before = kernels.active_variant()
    kernels.select_variant("baseline")  # with 16-bit activations
    package, seen = calibrated(architecture=architecture), Activations()
    Decoder(package).run(IDS, seen, whole=False)
    heads, settings = open_retention(package, method), replace(KVZAP, scorer=method)
    engine = NativeEngine(package, 1, settings)
    cache = engine.new_cache(settings, hot_tokens=None)
    for first, end in zip(CHUNK_STARTS, (*CHUNK_STARTS[1:], len(IDS)), strict=True):
        engine.run(IDS[first:end], cache)
    kernels.select_variant(before)
    for activations in seen.found:
        expected = expected_of(activations, heads.tensors)
        for head in range(package.spec.kv_heads):
            found = cache._native.retention(activations.layer, head)
            places = cache._native.positions(activations.layer, head)
            np.testing.assert_allclose(found, expected[places, head], atol=0.02 * expected.std())
    cache.close()


def test_the_logits_stay_and_chunks_change_nothing(calibrated: Callable[..., Package]) -> None:
    package = calibrated()
    rows, scores = [], []
    for settings, chunk in ((CacheSettings(storage="fp32"), 90), (KVZAP, 90), (KVZAP, 7)):
        engine = NativeEngine(package, 1, settings)
        cache = engine.new_cache(settings, hot_tokens=None)
        for first in range(0, len(IDS), chunk):
            row = engine.run(IDS[first : first + chunk], cache)
        rows.append(row)
        if settings is KVZAP:
            scores.append(scores_of(cache))
        cache.close()
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_allclose(rows[1], rows[2], atol=1e-3 * np.ptp(rows[1]))
    for one, other in zip(*scores, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3 * np.ptp(one))


@pytest.mark.parametrize("chunk", [90, 7, 1])
def test_a_gate_leaves_the_logits_alone(chunk: int, calibrated: Callable[..., Package]) -> None:
    """In layer 0, equal tokens are worth the same when all is read at once, or token by token: the others are the same
    then, or nobody. In chunks of 7 they are not."""
    package, rows = calibrated(), []
    for scorer in ("snapkv", "attention-gate"):
        settings = CacheSettings(scorer=scorer, storage="fp32")
        engine = NativeEngine(package, 1, settings)
        cache = engine.new_cache(settings, hot_tokens=None)
        for first in range(0, len(IDS), chunk):
            row = engine.run(IDS[first : first + chunk], cache)
        rows.append(row)
        scores = cache._native.retention(0, 0) if scorer == "attention-gate" else None
        cache.close()
    np.testing.assert_array_equal(rows[0], rows[1])
    assert scores is not None
    again = [place for place, token in enumerate(IDS) if IDS.index(token) < place]
    firsts = [IDS.index(IDS[place]) for place in again]
    assert again, "a token comes twice"
    assert np.allclose(scores[again], scores[firsts], atol=1e-4 * np.ptp(scores)) == (chunk != 7)


def test_the_policy_keeps_the_best(calibrated: Callable[..., Package]) -> None:
    package = calibrated()
    kv = {"hot_tokens": 128, "sinks": 16, "window": 32, "chunk": 64, "storage": "fp32"}
    with satchel.load(package.folder, policy="kvzap", kv=kv, threads=1, cache=False) as model:
        engine = model.engine
        assert isinstance(engine, NativeEngine)
        cache = engine.new_cache(model.options.settings, hot_tokens=128)
        engine.run(IDS[:64] * 3, cache)
        before = [cache._native.retention(1, head) for head in range(2)]  # in layer 0, equal tokens are equal
        cache.demote()
        for head in range(2):
            kept = cache._native.positions(1, head)
            assert len(kept) == 128
            assert {*range(16), *range(160, 192)} <= set(kept.tolist())
            middle = before[head][16:160]
            threshold = np.sort(middle)[-80]
            assert sorted(before[head][kept][16:-32]) == sorted(middle[middle >= threshold])
        cache.close()
        with model.read_text(TEXT) as context:
            assert context.policy == "kvzap"
            assert context.kv["hot_tokens"] == 128
            assert context.ask("What is cleaned?", max_new_tokens=4).usage.new_tokens > 0
            with context.fork() as branch:
                branch.ask("And when?", max_new_tokens=2)


@pytest.mark.parametrize("scorer", ["kvzap", "attention-gate"])
def test_with_recall_and_snapshots(scorer: str, calibrated: Callable[..., Package], tmp_path: Path) -> None:
    """Scores outlive the archive's steps and a snapshot; other heads do not open it."""
    package = calibrated()
    kv = {"hot_tokens": 512, "window": 128, "sinks": 64, "scorer": scorer, "codec": "q8", "chunk": 128}
    options: dict[str, Any] = {"kv": kv, "threads": 1, "cache_dir": tmp_path / "cache", "notice": lambda _: None}

    def read() -> tuple[bool, str]:
        with satchel.load(package.folder, **options) as model, model.read_text(TEXT) as context:
            assert context.kv["warm_bytes"] > 0
            return context.reopened, context.ask("What is cleaned?", max_new_tokens=6).text

    first, again = read(), read()
    assert (first[0], again[0]) == (False, True)
    assert first[1] == again[1]
    heads = open_retention(package, scorer)
    write_calibration(package, scorer, {name: 0 * values for name, values in heads.tensors.items()}, {})
    assert read()[0] is False


def test_pages_cost_what_the_plan_says(calibrated: Callable[..., Package]) -> None:
    package = calibrated()
    spec, found = package.spec, {}
    for settings in (CacheSettings(), replace(KVZAP, storage="bf16")):
        engine = NativeEngine(package, 1, settings)
        cache = engine.new_cache(settings, hot_tokens=None)
        page = cache._native.page_bytes
        assert engine.costs(settings, process_bytes=0).kv_bytes_per_page == spec.layers * spec.kv_heads * page
        found[settings.scorer] = page
        cache.close()
    assert found["kvzap"] == found["snapkv"] + 4 * kernels.PAGE_TOKENS


def test_stretched_positions_and_heads_go_together(calibrated: Callable[..., Package]) -> None:
    package = calibrated(context_length=128)
    with satchel.load(package.folder, policy="full", kv={"scorer": "kvzap"}, rope="yarn:2", threads=1) as model:
        kvzap = model.logits(IDS)
    with satchel.load(package.folder, policy="full", rope="yarn:2", threads=1) as model:
        np.testing.assert_array_equal(model.logits(IDS), kvzap)


def test_a_package_without_calibration(load_tiny: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="has no calibration for kvzap; make it once: satchel calibrate MODEL"):
        load_tiny(policy="kvzap")
    load_tiny()


def test_a_calibration_of_another_package(calibrated: Callable[..., Package]) -> None:
    package = calibrated()
    record = package.folder / "calibration" / "calibration.json"
    text = record.read_text(encoding="utf-8")
    record.write_text(text.replace(package.fingerprint, "0" * 64), encoding="utf-8")
    with pytest.raises(ModelError, match="is of another package; repeat it"):
        satchel.load(package.folder, policy="kvzap", threads=1)
    satchel.load(package.folder, threads=1).close()


def test_other_engines_say_so(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    portable = export_model(tiny_gguf(context_length=4096), tmp_path / "portable", flavour="portable")
    with pytest.raises(OptionError, match="kvzap.*not available in the portable flavour"):
        satchel.load(portable.folder, policy="kvzap", threads=1, notice=lambda _: None)
    with pytest.raises(OptionError, match="kvzap is not available with --engine llama.cpp"):
        satchel.load(portable.folder, policy="kvzap", engine="llama.cpp")
