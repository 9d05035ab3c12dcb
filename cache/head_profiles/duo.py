"""DuoAttention: heads that answers about far tokens do not need see sinks and a window."""

from __future__ import annotations

from .base import RankedProfile


class Duo(RankedProfile):
    """Heads with the lowest gates stream. `export/calibration/duo.py` says how they are trained, with departures."""

    name = "duo"
    paper = "DuoAttention, arXiv 2410.10819"
