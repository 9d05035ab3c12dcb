"""Calibrations that come with Satchel: whom they serve, and what goes before them. Whether they can be made again:
``test_real_calibration.py``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from satchel.errors import ModelError
from satchel.export.calibration import files
from satchel.export.calibration.methods import METHODS
from satchel.export.exporter import export_model
from satchel.export.hub.registry import find
from satchel.export.package import Package
from tiny_models import write_tiny_gguf

SCORES = {"scores": (2, 3)}
FOLDERS = sorted(files.SHIPPED.iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_is_shipped_is_whole_and_of_a_model_of_the_registry(folder: Path) -> None:
    value = json.loads((folder / files.CALIBRATION_FILE).read_text(encoding="utf-8"))
    assert set(value["methods"]) <= set(METHODS)
    for method, record in value["methods"].items():
        content = (folder / f"{method}.safetensors").read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (record["bytes"], record["sha256"])
        assert record["source"] == find(folder.name).sha256
    assert len(list(folder.iterdir())) == len(value["methods"]) + 1


def calibrated(package: Package, method: str, value: float) -> None:
    files.write_calibration(package, method, {"scores": np.full((2, 3), value, np.float32)}, {"seed": 0})


def value_of(package: Package, method: str) -> float:
    return float(files.open_calibration(package, method, SCORES).tensors["scores"][0, 0])


@pytest.fixture
def shipped(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if 'razor', with the value 1, came with Satchel for the tiny model; the package has none of its own."""
    calibrated(package, "razor", 1.0)
    folder = tmp_path / "shipped"
    folder.mkdir()
    shutil.move(files.calibration_folder(package), folder / "tiny")
    monkeypatch.setattr(files, "SHIPPED", folder)
    return folder


def test_serves_every_package_of_its_source(shipped: Path, source: Path, package: Package, tmp_path: Path) -> None:
    four = export_model(source, tmp_path / "four", bits=4)
    assert four.fingerprint != package.fingerprint
    for each in (package, four):
        assert value_of(each, "razor") == 1
        found = files.find_records(each)["razor"]
        assert (found.is_shipped, found.problem) == (True, None)
        assert files.read_records(each.folder) == {}


def test_serves_no_other_model(shipped: Path, tmp_path: Path) -> None:
    other = export_model(write_tiny_gguf(tmp_path / "other.gguf", seed=9), tmp_path / "other")
    assert files.find_records(other) == {}
    with pytest.raises(ModelError, match="has no calibration for razor"):
        value_of(other, "razor")


def test_what_a_package_has_of_its_own_goes_before(shipped: Path, package: Package) -> None:
    calibrated(package, "kvzap", 3.0)
    assert (value_of(package, "razor"), value_of(package, "kvzap")) == (1, 3)
    calibrated(package, "razor", 2.0)
    assert value_of(package, "razor") == 2
    path = files.calibration_folder(package) / files.CALIBRATION_FILE
    value = json.loads(path.read_text())
    value["methods"]["razor"]["package"] = "00"
    path.write_text(json.dumps(value))
    with pytest.raises(ModelError, match="is of another package; repeat it"):
        value_of(package, "razor")


def test_damage_is_noticed(shipped: Path, package: Package) -> None:
    path = shipped / "tiny" / "razor.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ModelError, match="is not what its record says"):
        value_of(package, "razor")


def test_a_record_names_no_file_elsewhere(shipped: Path, package: Package) -> None:
    path = shipped / "tiny" / files.CALIBRATION_FILE
    path.write_text(path.read_text().replace('"razor.safetensors"', '"../../package/model.onnx"'))
    assert value_of(package, "razor") == 1
