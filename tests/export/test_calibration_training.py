"""Heads that are trained: the sample on disk, and runs of every such method, which can be stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from satchel.errors import StorageError
from satchel.export.calibration import files, gate_head, retaining_head, sample, training
from satchel.export.calibration.methods import METHODS
from satchel.export.calibration.retention import open_retention, retention_shapes
from satchel.export.calibration.text import Order, Text
from satchel.export.exporter import export_model
from satchel.export.package import Package, open_package

pytest.importorskip("torch", reason="needs the extra 'calibrate'")
from satchel.export.calibration.decoder import Decoder

pytestmark = pytest.mark.filterwarnings("default")  # torch warns about itself
RNG = np.random.default_rng(1)
IDS = tuple(int(index) for index in RNG.integers(3, 250, 330))
TEXT = Text(IDS, before=(7, 8, 9), request=(20, 21, 22, 23))
ORDER = Order(window_tokens=32)
LOCRET = METHODS["locret"].calibrate
STATE, SAMPLE = (name.format("locret") for name in (training.STATE_FILE, training.SAMPLE_FILE))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retaining_head, "EPOCHS", 2)
    monkeypatch.setattr(gate_head, "EPOCHS", 2)
    monkeypatch.setattr(gate_head, "STEP_TOKENS", 64)


@pytest.fixture(params=["locret", "attention-gate"])
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


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


# --- the whole run, of every method that trains

def test_a_run_writes_heads_and_figures(method: str, package: Package) -> None:
    stages: list[tuple[str, int, int]] = []
    record = METHODS[method].calibrate(package, TEXT, ORDER, threads=1, progress=lambda *given: stages.append(given))
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
    assert 0 <= record["best_eighth"] <= 1
    assert record["peak_rss_bytes"] > 1 << 20
    assert files.read_records(package.folder) == {method: record}
    heads = open_retention(open_package(package.folder), method)
    names = retention_shapes(package.spec, method)
    assert set(heads.tensors) == {name.format(layer) for layer in range(package.spec.layers) for name in names}
    assert {path.name for path in (package.folder / "calibration").iterdir()} == {
        "calibration.json", f"{method}.safetensors",
    }  # fmt: skip


class StopError(Exception):
    """Ctrl-C."""


@pytest.mark.parametrize(("stage", "count", "read_again"), [("calibrating", 4 * 32 + 16, 6), ("training", 600, 0)])
def test_a_stopped_run_goes_on_and_ends_the_same(
    stage: str, count: int, read_again: int, method: str, source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    whole, stopped = (export_model(source, tmp_path / name) for name in ("whole", "stopped"))
    calibrate = METHODS[method].calibrate
    expected = calibrate(whole, TEXT, ORDER, threads=1)
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
        calibrate(stopped, TEXT, ORDER, threads=1, progress=stop)
    assert files.read_records(stopped.folder) == {}
    read.clear()
    begun: list[int] = []
    found = calibrate(
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
            LOCRET(package, TEXT, order, threads=1, progress=stop)

    expected = LOCRET(package, TEXT, ORDER, threads=1)["sha256"]
    stop_at(5 * 32, ORDER)
    stop_at(1, replace(ORDER, seed=3))  # in its first window
    assert LOCRET(package, TEXT, ORDER, threads=1)["sha256"] == expected


def test_another_order_or_damaged_files_start_anew(package: Package) -> None:
    def stop(_stage: str, done: int, _total: int) -> None:
        if done >= 64:
            raise StopError

    folder = package.folder / "calibration"
    with pytest.raises(StopError):
        LOCRET(package, TEXT, ORDER, threads=1, progress=stop)
    assert (folder / STATE).exists()
    other = LOCRET(package, TEXT, replace(ORDER, seed=3), threads=1)
    for name, content in ((STATE, b"PK\x03\x04 not at all"), (SAMPLE, b"short")):
        with pytest.raises(StopError):
            LOCRET(package, TEXT, replace(ORDER, seed=3), threads=1, progress=stop)
        (folder / name).write_bytes(content)
        assert LOCRET(package, TEXT, replace(ORDER, seed=3), threads=1)["sha256"] == other["sha256"]
    assert not (folder / STATE).exists()
    assert not (folder / SAMPLE).exists()
