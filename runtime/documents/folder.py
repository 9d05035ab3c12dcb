"""Which files of a folder may be documents, in a stable order, without what tools generate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .source import unreadable

# Hidden folders (.git, .venv) are skipped by their dot.
_GENERATED = frozenset(
    ["node_modules", "bower_components", "__pycache__", "site-packages", "venv", "_static", "_sources"]
)
_LOCK_FILES = ("package-lock.json", "yarn.lock", "pnpm-lock.yaml", "Cargo.lock", "poetry.lock", "uv.lock")
_GENERATED_ENDS = (*_LOCK_FILES, "searchindex.js", ".min.js", ".min.css", ".js.map", ".css.map")
_MARKERS = ("CACHEDIR.TAG", "pyvenv.cfg")  # a folder with such a file says itself that it can be made again


def walk(folder: Path, skipped: list[str]) -> Iterator[tuple[str, Path]]:
    """Files below ``folder`` as (name relative to it, path), sorted; adds to ``skipped`` what is left out.

    Links are not followed: one may lead out of the folder, or in circles.

    Raises:
        DocumentError: the folder itself may not be read.
    """

    def failed(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise unreadable(str(folder), error) from error
        skipped.append(f"{Path(error.filename).relative_to(folder).as_posix()}/ (permission denied)")

    for where, folders, files in os.walk(folder, onerror=failed):
        here = Path(where)
        kept = []
        for name in sorted(folders):
            relative = (here / name).relative_to(folder).as_posix()
            if name.startswith("."):
                continue
            if name in _GENERATED or any((here / name / marker).exists() for marker in _MARKERS):
                skipped.append(f"{relative}/ (generated)")
            elif (here / name).is_symlink():
                skipped.append(f"{relative} (a link)")
            else:
                kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            path = here / name
            relative = path.relative_to(folder).as_posix()
            if name.startswith("."):
                continue
            if path.is_symlink():
                skipped.append(f"{relative} (a link)")
            elif name.endswith(_GENERATED_ENDS):
                skipped.append(f"{relative} (generated)")
            elif path.is_file():
                yield relative, path
            else:
                skipped.append(f"{relative} (not a regular file)")
