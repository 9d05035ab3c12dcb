"""From what a person names (a .gguf file, a model or package folder, a name) to an opened package."""

from __future__ import annotations

from pathlib import Path

from ..devices.files.cache_folder import cache_folder
from ..devices.reporting import Notice, Progress, log_notice
from ..errors import ModelError
from .exporter import ensure_package
from .hub.download import fetch
from .hub.repository import fetch_folder, is_repository_name
from .package import LINKED, MANIFEST_FILE, Package, open_package
from .sources import is_huggingface


def resolve_model(
    name: str | Path,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    notice: Notice = log_notice,
    flavour: str = "native",
    linked: bool = False,
) -> Package:
    """The package of a model, fetched and exported (as ``flavour``) first where that is needed.

    ``linked``: one without weights, for the engine that runs .gguf files themselves.

    Raises:
        ModelError: no such model, or one that cannot be used.
        DownloadError, StorageError: it could not be fetched or stored.
    """
    if linked:
        return _linked_package(name, cache_dir, progress, notice)
    path = find_source(name, cache_dir=cache_dir, progress=progress, notice=notice)
    if path.is_dir() and ((path / MANIFEST_FILE).exists() or not is_huggingface(path)):
        return open_package(path)
    return ensure_package(path, cache_folder(cache_dir), progress, flavour=flavour, notice=notice)


def _linked_package(
    name: str | Path, cache_dir: Path | None, progress: Progress | None, notice: Notice
) -> Package:
    is_there = Path(name).exists()
    if isinstance(name, str) and not is_there and is_repository_name(name):  # before anything is fetched
        raise _no_gguf(name)
    path = find_source(name, cache_dir=cache_dir, progress=progress, notice=notice)
    if not path.is_dir():
        return ensure_package(path, cache_folder(cache_dir), progress, flavour=LINKED, notice=notice)
    if not (path / MANIFEST_FILE).exists():
        raise _no_gguf(path)
    package = open_package(path)
    if package.linked_file is None:
        raise ModelError(
            f"{path} is a package for Satchel's own kernels, and llama.cpp runs .gguf files: give the .gguf file that "
            "it was made of"
        )
    return package


def _no_gguf(name: str | Path) -> ModelError:
    return ModelError(
        f"{name} is no .gguf file, and llama.cpp runs nothing else; make one first: "
        f"satchel export {name} model.gguf --format gguf"
    )


def find_source(
    name: str | Path, *, cache_dir: Path | None = None, progress: Progress | None = None, notice: Notice = log_notice
) -> Path:
    """The file or folder that ``name`` means; a name of the registry or of the hub is fetched first.

    Raises:
        ModelError: there is no such file, folder or name.
        DownloadError, StorageError: it could not be fetched or stored.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~name of nobody
        raise ModelError(
            f"{name}: there is no such user's folder; give a .gguf file, a model or package folder, or a name"
        ) from None
    if path.is_file() or path.is_dir():
        return path
    if isinstance(name, str) and is_repository_name(name):
        return fetch_folder(name, progress=progress, notice=notice)
    if path.suffix == ".gguf" or len(path.parts) > 1:
        raise ModelError(
            f"{path} does not exist; give a .gguf file, a model or package folder, or a name from 'satchel models'"
        )
    return fetch(str(name), cache_dir=cache_dir, progress=progress, notice=notice)
