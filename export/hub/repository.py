"""Whole model folders from the Hugging Face hub, by their names there: ``org/name``.

``huggingface_hub`` does the work (resuming, checksums, tokens, one cache for all programs of a user: what another
one has fetched is found there). Only what the exporter reads is fetched: safetensors, JSON records and the chat
template of the top folder; never code, never pickles.
"""

from __future__ import annotations

import errno
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ...devices.files.safe_write import require_space
from ...devices.reporting import Notice, Progress, log_notice, no_progress
from ...devices.sizes import format_size
from ...errors import DownloadError, SatchelError, StorageError
from ..sources import open_source

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
WANTED = ("*.safetensors", "*.json", "*.jinja")
# folders (other formats of the same model), and the same weights in Mistral's own layout
UNWANTED = ("*/*", "consolidated*", "adapter_*")
PATTERNS = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
PROBE_SECONDS = 8.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TRUE = {"1", "true", "yes", "on"}


def is_repository_name(name: str) -> bool:
    """Whether ``name`` can be a model's on the hub: two words with a slash between, no file's name."""
    plain = _NAME.fullmatch(name) is not None and ".." not in name and "--" not in name
    return plain and not name.endswith((".gguf", ".safetensors", ".json"))


def fetch_folder(name: str, *, progress: Progress | None = None, notice: Notice | None = None) -> Path:
    """The folder of the model ``org/name``: that of the hub's cache if it is whole, or fetched now.

    Args:
        progress: called as progress("downloading", bytes done, bytes in total) after each file.

    Raises:
        DownloadError: the hub cannot be reached, or has no such model, or no safetensors of it.
        StorageError: the disk cannot take it.
    """
    import huggingface_hub.constants  # half a second that only this needs
    from huggingface_hub.utils.tqdm import disable_progress_bars

    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or None
    cached = _cached(huggingface_hub, name)
    if cached is not None:
        return cached
    if os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in _TRUE:
        raise DownloadError(
            f"{name} is neither a file or folder here nor in the hub's cache, and HF_HUB_OFFLINE is set; unset it"
        )
    disable_progress_bars()
    try:
        return _fetch(huggingface_hub, name, endpoint, progress or no_progress, notice or log_notice)
    except SatchelError:
        raise
    except Exception as error:  # the library's, those of whatever it speaks HTTP with, and the system's
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = huggingface_hub.constants.HF_HUB_CACHE
            raise StorageError(f"{where} cannot take {name} ({error.strerror}); set HF_HOME elsewhere") from None
        raise DownloadError(_explain(name, error)) from None


def _cached(hub: Any, name: str) -> Path | None:
    """The folder in the hub's cache, if it has one that is whole."""
    try:
        folder = Path(hub.snapshot_download(name, local_files_only=True, **PATTERNS))
        open_source(folder).close()
    except Exception:  # not there, not whole, or not readable: then it is asked for
        return None
    return folder


def _fetch(hub: Any, name: str, endpoint: str | None, progress: Progress, notice: Notice) -> Path:
    info = hub.HfApi(endpoint=endpoint).model_info(name, files_metadata=True, timeout=PROBE_SECONDS)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = {name: size for name, size in sizes.items() if _is_wanted(name)}
    if not any(file.endswith(".safetensors") for file in wanted):
        others = [file for file in sizes if file.endswith((".gguf", ".bin", ".pt", ".pth"))]
        detail = f", only {others[0]!r:.100} and the like" if others else ""
        raise DownloadError(f"{name} on the hub has no safetensors{detail}; choose another model, or a .gguf file")
    total, done = sum(wanted.values()), 0
    notice(f"fetching {name} from the hub: {len(wanted)} files, {format_size(total)}")
    cache = Path(hub.constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    require_space(cache, total)
    for file in sorted(wanted, key=lambda file: wanted[file]):  # what is refused for its config is refused soon
        hub.hf_hub_download(name, file, revision=info.sha, endpoint=endpoint)
        done += wanted[file]
        progress("downloading", done, total)
    # everything is there by now: this remembers which commit the branch is at
    return Path(hub.snapshot_download(name, endpoint=endpoint, **PATTERNS))


def _is_wanted(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in WANTED) and not any(fnmatch(file, pattern) for pattern in UNWANTED)


def _explain(name: str, error: Exception) -> str:
    """One line of what the library says in many."""
    kind = type(error).__name__
    detail = (str(error).strip().splitlines() or [""])[0][:200]
    if kind == "GatedRepoError":
        return f"{name} is open only to those who accepted its terms on the hub; do so, then set HF_TOKEN"
    if kind == "RepositoryNotFoundError":
        return f"{name} is neither a file or folder here nor a model on the hub (a private one needs HF_TOKEN)"
    return f"{name} is no file or folder here, and the hub could not give it ({kind}: {detail}); try again later"
