"""Fetching a model by name: from the sources in order, verified, under its final name only when whole.

Beside ``NAME.gguf`` lies ``NAME.gguf.json``: the size, time and SHA-256 of the file when it was verified.
As long as size and time agree the file is trusted without reading its hundreds of megabytes again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ...devices.files.cache_folder import cache_folder, models_folder
from ...devices.files.file_lock import file_lock
from ...devices.files.safe_write import make_folder, remove_stale, require_space, storage_errors, temporary_file
from ...devices.reporting import Notice, Progress, log_notice, no_progress
from ...devices.sizes import format_size
from ...errors import DownloadError, ModelError, StorageError
from .hub_source import HubSource
from .index_source import IndexSource
from .part_file import CHUNK_BYTES, part_files
from .registry import ModelEntry, all_models, find
from .source import Fetched, Job, Source, SourceError, SourceFactory, WrongContentError

SOURCES: tuple[SourceFactory, ...] = (HubSource, IndexSource)


def fetch(name: str, *, cache_dir: Path | None = None, progress: Progress | None = None,
          notice: Notice | None = None, verify: bool = False) -> Path:
    """The path of the verified .gguf of a registry model, fetched first if it is not there.

    Args:
        name: a name of the registry.
        cache_dir: the cache folder; None = the environment's or the platform's.
        progress: called as progress(stage, bytes done, bytes in total), see :class:`devices.reporting.Progress`.
        notice: called with lines that a person should know; None = the logger ``satchel``.
        verify: hash the file even if it was verified before.

    Raises:
        ModelError: no such model, or one whose architecture this version does not read.
        DownloadError: every source failed; the message lists each with its reason.
        StorageError: the cache folder cannot take it.
    """
    return fetch_entry(find(name), cache_dir=cache_dir, progress=progress, notice=notice, verify=verify)


def fetch_entry(entry: ModelEntry, *, cache_dir: Path | None = None, progress: Progress | None = None,
                notice: Notice | None = None, verify: bool = False) -> Path:
    """As :func:`fetch`, for an entry that need not be in the registry."""
    if not entry.supported:
        known = ", ".join(model.name for model in all_models() if model.supported)
        raise ModelError(f"model {entry.name!r} has the architecture {entry.architecture}, which this "
                         f"version does not run; choose one of {known}")
    job = Job(entry, model_path(entry, cache_dir), progress or no_progress, notice or log_notice)
    if not verify and is_verified(entry, job.target):
        return job.target
    folder = make_folder(job.target.parent)
    lock = folder / f".{entry.name}.lock"
    with storage_errors(folder), file_lock(lock, f"fetching {entry.name}", notice=job.notice):
        remove_stale(folder)
        if (not verify and is_verified(entry, job.target)) or _verify_present(job):
            return job.target
        already = max((path.stat().st_size for path in part_files(job.target)), default=0)
        require_space(folder, max(0, entry.bytes - already))
        try:
            _finish(job, *_fetch_from_sources(job))
        except KeyboardInterrupt:
            _say_what_is_kept(job)
            raise
        except StorageError:
            for part in part_files(job.target):  # give the space back
                part.unlink(missing_ok=True)
            raise
    return job.target


def model_path(entry: ModelEntry, cache_dir: Path | None = None) -> Path:
    """Where the .gguf of a registry model lies once it is fetched."""
    return models_folder(cache_folder(cache_dir)) / f"{entry.name}.gguf"


def is_verified(entry: ModelEntry, path: Path) -> bool:
    """Whether ``path`` is there and unchanged since it was verified (no bytes are read)."""
    record = _read_record(path)
    try:
        there = path.stat()
    except OSError:
        return False
    # A hub's file was held to the hub's own checksum, see hub_source.
    trusted = record.get("sha256") == entry.sha256 or record.get("source") == HubSource.key
    return trusted and (record.get("bytes"), record.get("mtime_ns")) == (there.st_size, there.st_mtime_ns)


def _fetch_from_sources(job: Job) -> tuple[Source, Fetched]:
    """The first source that gives the model, and what it gave."""
    reasons = []
    for make in SOURCES:
        source = make()
        try:
            return source, _try_source(source, job)
        except SourceError as error:
            reasons.append(f"{source.label}: {error}")
    raise DownloadError(f"cannot fetch {job.entry.name}: {'; '.join(reasons)}. If you have the file already, "
                        "give it: --model path/to/file.gguf")


def _try_source(source: Source, job: Job) -> Fetched:
    try:
        return source.fetch(job)
    except WrongContentError as error:
        if not error.resumed:
            raise
        job.notice(f"what was kept of an earlier download of {job.entry.name} is damaged; starting afresh")
        return source.fetch(job)


def _finish(job: Job, source: Source, fetched: Fetched) -> None:
    """Records what was verified, then gives the file its name: an end in between leaves nothing wrong."""
    _write_record(job, fetched.part, fetched.sha256, source.key)
    fetched.part.replace(job.target)
    for part in part_files(job.target):
        part.unlink(missing_ok=True)


def _verify_present(job: Job) -> bool:
    """Hashes the file that is there without a valid record, or on demand; True when it is right."""
    if not job.target.is_file():
        return False
    sha, done, total = hashlib.sha256(), 0, job.target.stat().st_size
    with job.target.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
            done += len(chunk)
            job.progress("checking", done, total)
    record = _read_record(job.target)
    source = str(record.get("source", IndexSource.key))
    # A hub's file was held to the hub's own checksum, which the record has.
    expected = str(record.get("sha256")) if source == HubSource.key else job.entry.sha256
    if sha.hexdigest() in (expected, job.entry.sha256):
        _write_record(job, job.target, sha.hexdigest(), source)
        return True
    job.notice(f"{job.target} is damaged (SHA-256 expected {expected}, got {sha.hexdigest()}); "
               "fetching it again")
    return False


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_record(path: Path) -> dict[str, object]:
    try:
        record = json.loads(_record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(job: Job, file: Path, sha256: str, source: str) -> None:
    stat = file.stat()
    record = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256, "source": source}
    with temporary_file(_record_path(job.target)) as out:
        out.write(json.dumps(record).encode())


def _say_what_is_kept(job: Job) -> None:
    kept = max((path.stat().st_size for path in part_files(job.target)), default=0)
    if kept:
        job.notice(f"stopped; {format_size(kept)} are kept, the same command goes on from there")
