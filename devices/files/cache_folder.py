"""Where Satchel keeps what it can fetch or make again: models, exported packages, snapshots.

The folder is, in this order: what the caller gives (``--cache-dir``, ``load(cache_dir=...)``), the
environment variable ``SATCHEL_CACHE_DIR``, the convention of the platform. Nothing is created by asking.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from ...errors import StorageError

ENVIRONMENT_VARIABLE = "SATCHEL_CACHE_DIR"
_PACKAGE_KEY = re.compile(r"[0-9a-f]{8,64}(-.+)?")


def cache_folder(override: Path | None = None) -> Path:
    """The absolute path of the cache folder (which may not exist yet).

    Raises:
        StorageError: the user has no home folder and named no other one.
    """
    try:
        if override is not None:
            return override.expanduser().absolute()
        named = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
        if named:
            return Path(named).expanduser().absolute()
        return _platform_folder()
    except RuntimeError:  # Path.home() and expanduser() where there is no home
        raise StorageError(f"this user has no home folder to keep models in: name one by --cache-dir or "
                           f"{ENVIRONMENT_VARIABLE}") from None


def _platform_folder() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "satchel" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "satchel"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification tells to ignore relative paths.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "satchel"


def models_folder(root: Path) -> Path:
    """Where fetched .gguf files lie below the cache folder ``root``."""
    return root / "models"


def packages_folder(root: Path) -> Path:
    """Where exported model packages lie below the cache folder ``root``."""
    return root / "packages"


def snapshots_folder(root: Path) -> Path:
    """Where snapshots of read documents lie below the cache folder ``root``."""
    return root / "snapshots"


def cold_folder(root: Path) -> Path:
    """Where old KV pages of running conversations lie below ``root``, in files without names."""
    return root / "cold"


def package_folder(root: Path, model_name: str, key: str) -> Path:
    """Where the package of a model lies; ``key`` is a hexadecimal hash, maybe with ``-more`` behind it."""
    if not _PACKAGE_KEY.fullmatch(key):
        raise ValueError(f"package key {key!r} does not match {_PACKAGE_KEY.pattern}")
    return packages_folder(root) / f"{model_name}-{key}"


def exported_packages(root: Path, model_name: str) -> list[Path]:
    """The finished packages of a model: folders named by :func:`package_folder`, with a manifest inside."""
    prefix = f"{model_name}-"
    try:
        folders = sorted(packages_folder(root).iterdir())
    except OSError:
        return []
    return [path for path in folders
            if path.name.startswith(prefix) and _PACKAGE_KEY.fullmatch(path.name[len(prefix):])
            and (path / "satchel.json").is_file()]
