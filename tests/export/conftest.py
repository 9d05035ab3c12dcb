"""Puts ``tests/helpers`` on the path: ``tests`` must not be on it, its folders have the names of ours."""

from __future__ import annotations

import sys
from pathlib import Path

HELPERS = str(Path(__file__).parents[1] / "helpers")
if HELPERS not in sys.path:
    sys.path.insert(0, HELPERS)
