"""From what a person names (a registry name, a .gguf file, a model or package folder) to an opened package."""

from __future__ import annotations

from pathlib import Path

from ..devices.files.cache_folder import cache_folder
from ..devices.reporting import Notice, Progress, log_notice
from ..errors import ModelError
from .exporter import ensure_package
from .hub.download import fetch
from .package import MANIFEST_FILE, Package, open_package
from .sources import is_huggingface


def resolve_model(
    name: str | Path, *, cache_dir: Path | None = None, progress: Progress | None = None, notice: Notice = log_notice
) -> Package:
    """The package of a model, fetched and exported first where that is needed.

    Raises:
        ModelError: no such model, or one that cannot be used.
        DownloadError, StorageError: it could not be fetched or stored.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~name of nobody
        raise ModelError(
            f"{name}: there is no such user's folder; give a .gguf file, a model or package folder, or a name"
        ) from None
    root = cache_folder(cache_dir)
    if path.is_dir() and ((path / MANIFEST_FILE).exists() or not is_huggingface(path)):
        return open_package(path)
    if path.is_file() or path.is_dir():
        return ensure_package(path, root, progress, notice=notice)
    if path.suffix == ".gguf" or len(path.parts) > 1:
        raise ModelError(
            f"{path} does not exist; give a .gguf file, a model or package folder, or a name from 'satchel models'"
        )
    source = fetch(str(name), cache_dir=cache_dir, progress=progress, notice=notice)
    return ensure_package(source, root, progress, notice=notice)
