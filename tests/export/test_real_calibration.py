"""The calibration that comes with Satchel is what its command makes of the default model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from satchel.export.calibration import files
from satchel.export.calibration.head_scores import SCORES
from satchel.export.hub.registry import DEFAULT_MODEL
from satchel.export.package import open_package
from satchel.runtime.calibrate import calibrate

SAMPLES = Path(__file__).parents[2] / "docs" / "samples"


@pytest.mark.real
@pytest.mark.filterwarnings("default")  # torch warns about itself
def test_the_shipped_head_scores_can_be_made_again(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    """On another processor some last digits are others. Those of duo and kvzap take many minutes: made by hand."""
    pytest.importorskip("torch", reason="needs the extra 'calibrate'")
    found = calibrate(real_model(DEFAULT_MODEL), (SAMPLES,), method="razor", cache_dir=tmp_path)
    package = open_package(Path(found["package_folder"]))
    shape = {SCORES: (package.spec.layers, package.spec.kv_heads)}
    made = files.open_calibration(package, "razor", shape).tensors[SCORES]
    shutil.rmtree(files.calibration_folder(package))
    assert files.find_records(package)["razor"].is_shipped
    shipped = files.open_calibration(package, "razor", shape).tensors[SCORES]
    np.testing.assert_allclose(made, shipped, atol=0.01)
