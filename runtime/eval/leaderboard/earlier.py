"""What an earlier table of the same comparison has: rows that need not be measured again, wherever its samples are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .board import Board
from .document import header, is_measured

SAME = ("format", "model", "context", "samples", "seed", "text", "suites", "package")


def read_earlier(file: Path) -> Mapping[str, Any] | None:
    """The leaderboard's JSON object in ``file``; None when there is none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def adopt(board: Board, earlier: Mapping[str, Any], *, again: bool = False) -> str:
    """Lets ``board`` keep the measured rows of ``earlier``; ``again``: but those that it is to measure.

    Returns:
        Why nothing is kept: which of the things that must be the same is another one. Empty when all are.
    """
    now = json.loads(json.dumps(header(board)))
    others = [key for key in SAME if earlier.get(key) != now[key]]
    if others:
        return f"another {others[0]}"
    stamp = {key: earlier[key] for key in ("date", "machine")}
    rows = {(row["method"], row["budget"]): {**stamp, **row} for row in earlier["rows"] if is_measured(row)}
    asked = {entry.key for entry in board.entries} if again else set()
    board.kept = {key: row for key, row in rows.items() if key not in asked}
    board.kept_budgets = tuple(earlier["budgets"])
    return ""
