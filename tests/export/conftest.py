"""Puts ``tests/helpers`` on the path: ``tests`` must not be on it, its folders have the names of ours. And a tiny model
for whoever calibrates one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from satchel.export.exporter import export_model
from satchel.export.package import Package

HELPERS = str(Path(__file__).parents[1] / "helpers")
if HELPERS not in sys.path:
    sys.path.insert(0, HELPERS)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .gguf file of a tiny model."""
    from tiny_models import write_tiny_gguf

    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def package(source: Path, tmp_path: Path) -> Package:
    """Its package, made anew for each test."""
    return export_model(source, tmp_path / "package")
