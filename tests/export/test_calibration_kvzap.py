"""KVzap's calibration: labels against their definition, ridge against lstsq, and a run that can be stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from satchel.errors import ModelError, OptionError
from satchel.export.calibration import files, retention
from satchel.export.calibration.ridge import FitSums, RidgeSums
from satchel.export.exporter import export_model
from satchel.export.package import Package, open_package
from tiny_models import write_tiny_gguf

torch = pytest.importorskip("torch", reason="needs the extra 'calibrate'")
from satchel.export.calibration import kvzap  # noqa: E402
from satchel.export.calibration.decoder import Decoder  # noqa: E402
from satchel.export.calibration.kvzap import calibrate_kvzap  # noqa: E402
from satchel.export.calibration.labels import Labels  # noqa: E402
from satchel.export.calibration.text import Order, Text, Window, cut_windows, held_out  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch warns about itself
RNG = np.random.default_rng(1)
IDS = tuple(int(index) for index in RNG.integers(3, 250, 330))
TEXT = Text(IDS, before=(7, 8, 9), request=(20, 21, 22, 23))
ORDER = Order(window_tokens=32)


# --- labels


class Everything:
    """All that an observer is shown, head by head."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.weights: list[dict[int, Any]] = []

    def enter(self, activations: Any) -> None:
        self.layers.append(activations)
        self.weights.append({})

    def attended(self, head: int, first: int, weights: Any) -> None:
        assert first == 0, "one block"
        self.weights[-1][head] = weights


def labels_by_hand(seen: Everything, layer: int, window: Window, rows: range, head: int) -> list[float]:
    """Token by token and query by query, for a KV head."""
    found, group = seen.layers[layer], 2
    size, labels = found.values.shape[2], []
    for token in range(window.first, window.end):
        best = 0.0
        for query_head in range(head * group, (head + 1) * group):
            output = found.output_weight[:, query_head * size : (query_head + 1) * size]
            length = float((output @ found.values[token, head]).norm())
            for row in rows:
                if row > token:
                    weight = float(seen.weights[layer][query_head][row, token])
                    best = max(best, weight * length / float(found.inputs[row].norm()))
        labels.append(math.log(max(best, 1e-12)))
    return labels


@pytest.mark.parametrize(("architecture", "target"), [("qwen2", "repeat"), ("qwen2", "later"), ("gemma2", "repeat")])
def test_labels_are_what_they_say(architecture: str, target: str, tmp_path: Path) -> None:
    made = export_model(write_tiny_gguf(tmp_path / "tiny.gguf", architecture), tmp_path / "package")
    decoder, spec = Decoder(made), made.spec
    window = cut_windows(TEXT, replace(ORDER, target=target))[0]
    seen = Everything()
    decoder.run(window.ids, seen, whole=False)
    taken: list[tuple[int, Any, Any]] = []
    labels = Labels(window, spec.attention_windows, lambda *given: taken.append(given))
    decoder.run(window.ids, labels, whole=False)
    labels.finish()
    assert [layer for layer, _, _ in taken] == list(range(spec.layers))
    for layer, inputs, found in taken:
        torch.testing.assert_close(inputs, seen.layers[layer].inputs[3:35])
        windowed = bool(spec.attention_windows[layer])
        start = window.repeated if window.repeated is not None and not windowed else window.first
        for head in range(spec.kv_heads):
            by_hand = labels_by_hand(seen, layer, window, range(start, len(window.ids)), head)
            np.testing.assert_allclose(found[:, head].numpy(), by_hand, rtol=1e-4, atol=1e-4)


def test_windows_cover_what_the_seed_chooses() -> None:
    windows = cut_windows(TEXT, ORDER)
    assert len(windows) == 10
    assert all(window.ids[:3] == (7, 8, 9) and len(window.ids) == 3 + 32 + 4 + 32 for window in windows)
    assert all(window.ids[window.first : window.end] == window.ids[window.repeated :] for window in windows)
    starts = [window.ids[3:35] for window in windows]
    assert sorted(starts) == sorted(IDS[at : at + 32] for at in range(0, 320, 32))
    assert starts != [window.ids[3:35] for window in cut_windows(TEXT, replace(ORDER, seed=1))]
    some = cut_windows(TEXT, replace(ORDER, tokens=100))
    assert [window.ids[3:35] for window in some] == starts[:3]
    assert [held_out(count) for count in (2, 10, 16, 40)] == [1, 1, 2, 5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_tokens": 8}, "window is 8 tokens; give 16 to 65536"),
        ({"tokens": 63}, "63 tokens are less than two windows of 32"),
        ({"target": "next"}, "target 'next' is not known; choose repeat or later"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
    ],
)
def test_orders_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(ORDER, **values)


def test_a_short_text_is_refused() -> None:
    with pytest.raises(OptionError, match="has 330 tokens.*needs two windows of 200 or more"):
        cut_windows(TEXT, Order(window_tokens=200))


# --- ridge


def test_ridge_is_that_of_all_samples_at_once() -> None:
    x, y = RNG.normal(size=(60, 5)) * (1, 10, 0.1, 1, 1) + 3, RNG.normal(size=(60, 2))
    sums = RidgeSums(1, 5, 2)
    for first in range(0, 60, 13):
        sums.add(0, x[first : first + 13], y[first : first + 13])
    weights, biases = sums.solve(0.0)
    exact, *_ = np.linalg.lstsq(np.concatenate([x, np.ones((60, 1))], axis=1), y, rcond=None)
    np.testing.assert_allclose(weights[0], exact[:5].T, rtol=1e-5)
    np.testing.assert_allclose(biases[0], exact[5], rtol=1e-5)
    shrunk, _ = sums.solve(1.0)
    centred = x - x.mean(axis=0)
    both = centred.T @ centred + np.diag(np.square(centred).sum(axis=0))
    np.testing.assert_allclose(shrunk[0], np.linalg.solve(both, centred.T @ (y - y.mean(axis=0))).T, rtol=1e-5)


def test_a_feature_that_never_moves_is_no_trouble() -> None:
    sums = RidgeSums(1, 2, 1)
    x = np.stack([np.arange(9.0), np.full(9, 5.0)], axis=1)
    sums.add(0, x, 2 * x[:, :1] + 1)
    weights, _ = sums.solve(0.0)
    np.testing.assert_allclose(weights[0, 0], [2, 0], atol=1e-6)


def test_r2_of_guesses() -> None:
    y = RNG.normal(size=(40, 2))
    mean = np.broadcast_to(y.mean(axis=0), y.shape)
    fit = FitSums(2, 1, 2)
    fit.add(0, y[:7], [y[:7], mean[:7]])
    fit.add(0, y[7:], [y[7:], mean[7:]])
    np.testing.assert_allclose(fit.r2(), [[1.0], [0.0]], atol=1e-12)


# --- the run


def test_a_run_writes_heads_and_figures(package: Package) -> None:
    stages: list[tuple[str, int, int]] = []
    record = calibrate_kvzap(package, TEXT, ORDER, threads=1, progress=lambda *given: stages.append(given))
    assert stages[-1] == ("calibrating", 320, 320)
    assert [done for _, done, _ in stages] == sorted(done for _, done, _ in stages)
    assert (record["tokens"], record["held_out_tokens"], record["window_tokens"], record["seed"]) == (288, 32, 32, 0)
    assert len(record["r2_of_layer"]) == package.spec.layers
    assert record["r2"] == pytest.approx(np.mean(record["r2_of_layer"]), abs=1e-4)
    assert record["peak_rss_bytes"] > 1 << 20
    assert record["r2"] == pytest.approx(max(record["r2_of_ridge"].values()), abs=1e-4)
    assert record["r2_of_ridge"][str(record["ridge"])] == max(record["r2_of_ridge"].values())
    assert files.read_records(package.folder) == {"kvzap": record}
    heads = retention.open_retention(open_package(package.folder), "kvzap")
    assert len(heads.tensors) == 2 * package.spec.layers
    assert sorted(path.name for path in (package.folder / "calibration").iterdir()) == [
        "calibration.json", "kvzap.safetensors",
    ]  # fmt: skip


class StopError(Exception):
    """Ctrl-C."""


def test_a_stopped_run_goes_on_and_ends_the_same(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole, stopped = (export_model(source, tmp_path / name) for name in ("whole", "stopped"))
    expected = calibrate_kvzap(whole, TEXT, ORDER, threads=1)
    read = []
    run = Decoder.run

    def count(self: Decoder, ids: Any, *more: Any, **named: Any) -> Any:
        read.append(ids)
        return run(self, ids, *more, **named)

    monkeypatch.setattr(Decoder, "run", count)

    def stop(stage: str, done: int, total: int) -> None:
        if done >= 4 * 32 + 16:  # in the fifth window
            raise StopError

    with pytest.raises(StopError):
        calibrate_kvzap(stopped, TEXT, ORDER, threads=1, progress=stop)
    assert files.read_records(stopped.folder) == {}
    assert len(read) == 5
    found = calibrate_kvzap(stopped, TEXT, ORDER, threads=1)
    assert len(read) == 5 + 6
    assert (found["sha256"], found["r2"]) == (expected["sha256"], expected["r2"])


def test_another_order_or_a_damaged_file_starts_anew(package: Package, monkeypatch: Any) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done >= 64:
            raise StopError

    with pytest.raises(StopError):
        calibrate_kvzap(package, TEXT, ORDER, threads=1, progress=stop)
    partial = package.folder / "calibration" / kvzap.SUMS_FILE
    assert partial.exists()
    other = calibrate_kvzap(package, TEXT, replace(ORDER, seed=3), threads=1)
    partial.write_bytes(b"PK\x03\x04 not at all")
    again = calibrate_kvzap(package, TEXT, replace(ORDER, seed=3), threads=1)
    assert again["sha256"] == other["sha256"]
    assert not partial.exists()


# --- what is in the package


@pytest.fixture
def calibrated(package: Package) -> Package:
    spec = package.spec
    weights = RNG.normal(size=(spec.layers, spec.kv_heads, spec.hidden)).astype(np.float32)
    retention.write_retention(package, "kvzap", weights, weights[:, :, 0], {"seed": 0})
    return package


def change_record(package: Package, /, **values: Any) -> None:
    path = package.folder / "calibration" / "calibration.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["methods"]["kvzap"] |= values
    path.write_text(json.dumps(record), encoding="utf-8")


def test_what_is_written_is_read(calibrated: Package) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    heads = retention.open_retention(calibrated, "kvzap")
    theirs = safetensors.load_file(calibrated.folder / "calibration" / "kvzap.safetensors")
    for layer in range(calibrated.spec.layers):
        for name, written in ((retention.WEIGHT, "weight"), (retention.BIAS, "bias")):
            expected = theirs[f"layers.{layer}.retention.{written}"]
            np.testing.assert_array_equal(expected, heads.tensors[name.format(layer)])
    assert retention.open_retention(replace(calibrated, yarn_factor=4.0), "kvzap").sha256 == heads.sha256


def test_other_methods_stay(calibrated: Package) -> None:
    spec = calibrated.spec
    weights = np.zeros((spec.layers, spec.kv_heads, spec.hidden), np.float32)
    retention.write_retention(calibrated, "other", weights, weights[:, :, 0], {})
    assert sorted(files.read_records(calibrated.folder)) == ["kvzap", "other"]
    assert retention.open_retention(calibrated, "kvzap").tensors[retention.WEIGHT.format(0)].any()


def damaged_heads(package: Package) -> None:
    path = package.folder / "calibration" / "kvzap.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def heads_of_another_shape(package: Package) -> None:
    weights = np.zeros((package.spec.layers, 1, 4), np.float32)
    retention.write_retention(package, "kvzap", weights, weights[:, :, 0], {})


def heads_without_numbers(package: Package) -> None:
    spec = package.spec
    weights = np.full((spec.layers, spec.kv_heads, spec.hidden), np.nan, np.float32)
    retention.write_retention(package, "kvzap", weights, weights[:, :, 0], {})


def text_of_record(text: str) -> Any:
    return lambda package: (package.folder / "calibration" / "calibration.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda package: change_record(package, package="00"), "is of another package; repeat it: satchel calibrate"),
        (lambda package: change_record(package, bytes=3), "is not what its record says; repeat the calibration"),
        (damaged_heads, "is not what its record says; repeat the calibration"),
        (heads_of_another_shape, "has no layers.0.retention.weight of shape"),
        (heads_without_numbers, "holds NaN or infinity"),
        (lambda package: (package.folder / "calibration" / "kvzap.safetensors").unlink(), "cannot be read"),
        (text_of_record("{"), "is damaged .not JSON.; remove"),
        (text_of_record("[]"), "is not a record of calibrations"),
        (text_of_record('{"format": "satchel-calibration", "methods": {"kvzap": 3}}'), "is not a record"),
        (text_of_record('{"format": "satchel-calibration", "format_version": 9, "methods": {}}'), "version 9, this"),
    ],
)
def test_damage_is_refused(calibrated: Package, damage: Any, message: str) -> None:
    damage(calibrated)
    with pytest.raises(ModelError, match=message):
        retention.open_retention(calibrated, "kvzap")


def test_without_calibration(package: Package) -> None:
    assert files.read_records(package.folder) == {}
    with pytest.raises(ModelError, match="has no calibration for kvzap; make it once: satchel calibrate"):
        retention.open_retention(package, "kvzap")
