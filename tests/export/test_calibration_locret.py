"""Locret's calibration: labels against their definition, a head that learns, and a run that can be stopped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from satchel.errors import StorageError
from satchel.export.calibration import files, retaining_head, sample
from satchel.export.calibration.retention import INNER, OUTER, locret_features, open_retention
from satchel.export.calibration.text import Order, Text, cut_windows
from satchel.export.exporter import export_model
from satchel.export.package import Package, open_package
from tiny_models import write_tiny_gguf

torch = pytest.importorskip("torch", reason="needs the extra 'calibrate'")
from satchel.export.calibration import locret  # noqa: E402
from satchel.export.calibration.decoder import Decoder  # noqa: E402
from satchel.export.calibration.labels import AnswerAttention  # noqa: E402
from satchel.export.calibration.locret import calibrate_locret  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch warns about itself
RNG = np.random.default_rng(1)
IDS = tuple(int(index) for index in RNG.integers(3, 250, 330))
TEXT = Text(IDS, before=(7, 8, 9), request=(20, 21, 22, 23))
ORDER = Order(window_tokens=32)


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retaining_head, "EPOCHS", 2)


# --- labels


class Activations:
    def __init__(self) -> None:
        self.found: list[Any] = []

    def enter(self, activations: Any) -> None:
        self.found.append(activations)

    def attended(self, *_: Any) -> None: ...


@pytest.mark.parametrize(("architecture", "target"), [("qwen2", "repeat"), ("qwen2", "later"), ("gemma3", "repeat")])
def test_labels_are_what_they_say(
    architecture: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token and query by query: the logit, less the logarithm of what the query gives to all that it sees."""
    made = export_model(write_tiny_gguf(tmp_path / "tiny.gguf", architecture), tmp_path / "package")
    monkeypatch.setattr("satchel.export.calibration.decoder.ROW_BLOCK", 7)
    decoder, spec = Decoder(made), made.spec
    window, seen = cut_windows(TEXT, replace(ORDER, target=target))[0], Activations()
    decoder.run(window.ids, seen, whole=False)
    taken: list[tuple[int, Any, Any]] = []
    labels = AnswerAttention(window, spec.attention_windows, lambda *given: taken.append(given))
    decoder.run(window.ids, labels, whole=False)
    labels.finish()
    assert [layer for layer, _, _ in taken] == list(range(spec.layers))
    count, group = len(window.ids), spec.heads // spec.kv_heads
    behind = torch.arange(count)[:, None] - torch.arange(count)
    for layer, features, found in taken:
        layer_seen, reach = seen.found[layer], spec.attention_windows[layer]
        assert features.shape == (32, locret_features(spec))
        parts = features.split([spec.heads * spec.head_size, *[spec.kv_heads * spec.head_size] * 2], dim=1)
        for part, whole in zip(parts, (layer_seen.queries, layer_seen.keys, layer_seen.values), strict=True):
            torch.testing.assert_close(part, whole[3:35].flatten(1))
        unseen = (behind < 0) | ((behind >= reach) if reach else torch.tensor(False))
        for head in range(spec.kv_heads):
            best = torch.full((count, count), -math.inf)
            for query_head in range(head * group, (head + 1) * group):
                logits = layer_seen.turned_queries[:, query_head] @ layer_seen.turned_keys[:, head].T
                logits = (logits * spec.attention_scale).masked_fill(unseen, -math.inf)
                best = best.maximum(logits - logits.logsumexp(dim=1, keepdim=True))
            for token in range(3, 35):
                answers = window.repeated is not None and not reach
                by_hand = best[window.repeated if answers else token + 1 :, token]
                expected = float(by_hand.max()) if len(by_hand) else math.log(1e-12)
                assert float(found[token - 3, head]) == pytest.approx(max(expected, math.log(1e-12)), abs=1e-3)


# --- the sample


def test_a_sample_gives_back_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "sample"
    xs, ys = (RNG.normal(size=(2, 3, 8, width)).astype(np.float32) for width in (5, 2))
    made = sample.Sample(path, 2, 3, 8, 5, 2)
    assert (made.kept, made.rows) == (False, 8)
    for layer in range(2):
        for window in (2, 0, 1):
            made.write(layer, window, xs[layer, window], ys[layer, window])
    made.flush()
    made.close()
    again = sample.Sample(path, 2, 3, 8, 5, 2)
    assert again.kept
    for layer in range(2):
        x, y = again.read(layer, range(1, 3))
        np.testing.assert_array_equal(x, xs[layer, 1:].astype(np.float16))
        np.testing.assert_array_equal(y, ys[layer, 1:])
    again.close()
    monkeypatch.setattr(sample, "MAX_BYTES", path.stat().st_size * 5 // 8)
    smaller = sample.Sample(path, 2, 3, 8, 5, 2)
    assert (smaller.kept, smaller.rows) == (False, 5)
    smaller.write(0, 0, xs[0, 0], ys[0, 0])
    np.testing.assert_array_equal(smaller.read(0, range(1))[1][0], ys[0, 0, :5])
    smaller.close()
    monkeypatch.setattr("satchel.devices.files.safe_write.free_bytes", lambda _: 100)
    with pytest.raises(StorageError, match="no space in .*100B free"):
        sample.Sample(tmp_path / "other", 2, 3, 8, 5, 2)


# --- training


CONSTANT = np.array([0, 0, 0, 0, 0, 2], np.float32)


def planted(windows: int) -> tuple[Any, Any]:
    """Features of very different sizes (one is constant, as biases make them), labels a bent function of them."""
    x = RNG.normal(size=(windows, 64, 6)).astype(np.float32) * np.array([1, 100, 0.01, 1, 1, 0], np.float32) + CONSTANT
    y = np.stack([np.abs(x[..., 0]) + 5, x[..., 1] / 100 * 3], axis=2)
    return x, y.astype(np.float32)


def test_a_head_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retaining_head, "EPOCHS", 40)
    calls: list[tuple[int, int]] = []
    head = retaining_head.trained_head(*planted(20), seed=3, report=lambda *given: calls.append(given))
    width = retaining_head.WIDTH
    assert [part.shape for part in vars(head).values()] == [(width, 6), (width,), (2, width), (2,)]
    assert calls[-1][0] == calls[-1][1] == 40 * 20 * 64
    loss, r2, spearman = retaining_head.held_out_figures(*planted(4), head)
    assert loss < 0.15
    assert r2 > 0.9
    assert spearman > 0.8
    blind = retaining_head.held_out_figures(*planted(4), replace(head, outer=0 * head.outer))
    assert blind[0] > 0.5
    assert blind[1] < 0.1
    again = retaining_head.trained_head(*planted(20), seed=4, report=lambda *_: None)
    assert not np.array_equal(head.inner, again.inner)


def test_the_figures_are_what_they_say() -> None:
    """A head that says SiLU of the first feature, on labels that are its square root or the negative."""
    x = np.linspace(0.5, 6, 40, dtype=np.float32).reshape(2, 20, 1)
    parts = [[1.0]], [0.0], [[1.0], [1.0]], [0.0, 0.0]
    head = retaining_head.Head(*(np.array(part, np.float32) for part in parts))
    said = x[..., 0] / (1 + np.exp(-x[..., 0]))
    y = np.stack([np.sqrt(x[..., 0]), -x[..., 0]], axis=2)
    loss, r2, spearman = retaining_head.held_out_figures(x, y, head)
    assert spearman == pytest.approx(0, abs=1e-6)  # 1 for one head, -1 for the other
    distance = np.abs(said[..., None] - y)
    smooth = np.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
    assert loss == pytest.approx(smooth + 0.0025 * np.square(np.diff(said, axis=1)).mean(), rel=1e-4)
    spread = np.square(y - y.mean(axis=(0, 1))).sum()
    assert r2 == pytest.approx(1 - np.square(distance).sum() / spread, rel=1e-4)


# --- the whole run


def test_a_run_writes_heads_and_figures(package: Package) -> None:
    stages: list[tuple[str, int, int]] = []
    record = calibrate_locret(package, TEXT, ORDER, threads=1, progress=lambda *given: stages.append(given))
    assert ("calibrating", 320, 320) in stages
    assert stages[-1][0] == "training"
    assert stages[-1][1] == stages[-1][2]
    for name in ("calibrating", "training"):
        done = [count for stage, count, _ in stages if stage == name]
        assert done == sorted(done)
    assert (record["tokens"], record["held_out_tokens"], record["window_tokens"], record["seed"]) == (288, 32, 32, 0)
    assert len(record["r2_of_layer"]) == package.spec.layers
    assert record["r2"] == pytest.approx(np.mean(record["r2_of_layer"]), abs=1e-3)
    assert record["loss"] > 0
    assert -1 <= record["spearman"] <= 1
    assert record["peak_rss_bytes"] > 1 << 20
    assert files.read_records(package.folder) == {"locret": record}
    heads = open_retention(open_package(package.folder), "locret")
    names = {name.format(layer) for layer in range(package.spec.layers) for name in (INNER, OUTER)}
    assert set(heads.tensors) == names | {name + "_bias" for name in names}
    assert sorted(path.name for path in (package.folder / "calibration").iterdir()) == [
        "calibration.json", "locret.safetensors",
    ]  # fmt: skip


class StopError(Exception):
    """Ctrl-C."""


@pytest.mark.parametrize(("stage", "count", "read_again"), [("calibrating", 4 * 32 + 16, 6), ("training", 600, 0)])
def test_a_stopped_run_goes_on_and_ends_the_same(
    stage: str, count: int, read_again: int, source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    whole, stopped = (export_model(source, tmp_path / name) for name in ("whole", "stopped"))
    expected = calibrate_locret(whole, TEXT, ORDER, threads=1)
    read: list[Any] = []
    run = Decoder.run

    def counted(self: Decoder, ids: Any, *more: Any, **named: Any) -> Any:
        read.append(ids)
        return run(self, ids, *more, **named)

    def stop(now: str, done: int, total: int) -> None:
        if now == stage and done >= count:
            raise StopError

    monkeypatch.setattr(Decoder, "run", counted)
    with pytest.raises(StopError):
        calibrate_locret(stopped, TEXT, ORDER, threads=1, progress=stop)
    assert files.read_records(stopped.folder) == {}
    read.clear()
    begun: list[int] = []
    found = calibrate_locret(
        stopped, TEXT, ORDER, threads=1, progress=lambda now, done, _: begun.append(done) if now == "training" else None
    )
    assert len(read) == read_again
    assert (found["sha256"], found["loss"]) == (expected["sha256"], expected["loss"])
    assert (begun[0] > 288 * 2) == (stage == "training")  # the first layer was there


def test_a_run_that_another_has_written_over_starts_anew(package: Package) -> None:
    def stop_at(count: int, order: Order) -> None:
        def stop(_stage: str, done: int, _total: int) -> None:
            if done >= count:
                raise StopError

        with pytest.raises(StopError):
            calibrate_locret(package, TEXT, order, threads=1, progress=stop)

    expected = calibrate_locret(package, TEXT, ORDER, threads=1)["sha256"]
    stop_at(5 * 32, ORDER)
    stop_at(1, replace(ORDER, seed=3))  # in its first window
    assert calibrate_locret(package, TEXT, ORDER, threads=1)["sha256"] == expected


def test_another_order_or_damaged_files_start_anew(package: Package) -> None:
    def stop(_stage: str, done: int, _total: int) -> None:
        if done >= 64:
            raise StopError

    folder = package.folder / "calibration"
    with pytest.raises(StopError):
        calibrate_locret(package, TEXT, ORDER, threads=1, progress=stop)
    assert (folder / locret.STATE_FILE).exists()
    other = calibrate_locret(package, TEXT, replace(ORDER, seed=3), threads=1)
    for name, content in ((locret.STATE_FILE, b"PK\x03\x04 not at all"), (locret.SAMPLE_FILE, b"short")):
        with pytest.raises(StopError):
            calibrate_locret(package, TEXT, replace(ORDER, seed=3), threads=1, progress=stop)
        (folder / name).write_bytes(content)
        assert calibrate_locret(package, TEXT, replace(ORDER, seed=3), threads=1)["sha256"] == other["sha256"]
    assert not (folder / locret.STATE_FILE).exists()
    assert not (folder / locret.SAMPLE_FILE).exists()
