"""Snapshots: what was read once is not read twice. ``store.py`` keeps the files, ``docs/snapshot-format.md`` has their
bytes.
"""

from __future__ import annotations

from .entry import Entry, Subject, settings_key
from .layout import RANS_8, RANS_BF16, RAW, Section
from .snapshot import Snapshot
from .store import Match, SnapshotStore
from .writer import SnapshotWriter

__all__ = [
    "RANS_8", "RANS_BF16", "RAW", "Entry", "Match", "Section", "Snapshot", "SnapshotStore", "SnapshotWriter",
    "Subject", "settings_key",
]  # fmt: skip
