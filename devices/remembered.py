"""Small results of measuring, kept as JSON files in the cache folder; losing one costs seconds, never an answer."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any


def remember(path: Path, value: dict[str, Any], *, now: float | None = None) -> None:
    """Writes ``value`` under a temporary name, then renames. A folder that refuses is no error."""
    moment = time.time() if now is None else now
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".satchel-tmp-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"measured": moment, **value}, file)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def remembered(path: Path, *, valid_seconds: float, now: float | None = None) -> dict[str, Any] | None:
    """What was written less than ``valid_seconds`` ago; None for anything else that the file may hold."""
    moment = time.time() if now is None else now
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        age = moment - float(value.pop("measured"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return value if 0 <= age < valid_seconds else None
