"""The folder of snapshots: finding the one that helps, saving, and staying below a limit.

``<model>-<settings>/<hash of the tokens>.satchel``. A file's modification time is its last use. Several processes may
work in one folder: who reads holds a shared lock on the file, who removes or writes an exclusive one, and who saves
holds a lock file beside it. A process that is killed leaves no lock, and at most a temporary file that the next saving
removes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...devices.files.file_lock import LockUnsupportedError, file_lock, is_linked, try_lock
from ...devices.files.safe_write import TEMPORARY_PREFIX, free_bytes, make_folder, remove_stale, storage_errors
from ...devices.reporting import Notice, log_notice
from ...devices.sizes import format_size
from ...errors import OptionError, SnapshotError, StorageError
from .entry import (
    SUFFIX,
    TOKENS,
    Entry,
    Subject,
    Tokens,
    file_name,
    folder_name,
    head_of,
    metadata_of,
    token_array,
)
from .snapshot import Snapshot
from .writer import Piece, SnapshotWriter

SHARE_OF_DISK, MOST_BYTES = 0.10, 20_000_000_000  # the default limit
_LOCK_SUFFIX = ".lock"
_PATIENCE_SECONDS = 120.0  # for another process that saves the same document
_SHORTEST_ID_PREFIX = 4

SectionToWrite = tuple[str, Iterable[Piece], str]
"""Name, pieces, coding (see `SnapshotWriter.add`)."""
Entries = list[Entry]
_Files = list[tuple[Path, int, float]]  # path, bytes, last use


@dataclass(frozen=True)
class Match:
    """A snapshot that shares the first ``common_tokens`` tokens with what was asked for."""

    entry: Entry
    common_tokens: int

    @property
    def path(self) -> Path:
        return self.entry.path

    @property
    def tokens(self) -> int:
        """Tokens in the snapshot."""
        return self.entry.tokens

    @property
    def is_prefix(self) -> bool:
        """Whether all of the snapshot is wanted; otherwise the tokens from ``common_tokens`` on must be forgotten."""
        return self.common_tokens == self.entry.tokens


class SnapshotStore:
    """Snapshots below ``folder``, together at most ``limit_bytes`` (None: a tenth of the disk's free space, at most
    20 GB). Nothing is created before something is saved. ``notice`` is told what a person should know.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None, *, notice: Notice = log_notice) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._notice = notice
        self._reported: set[Path] = set()

    @property
    def limit_bytes(self) -> int:
        """Bytes that all snapshots together may have."""
        if self._limit_bytes is not None:
            return self._limit_bytes
        return min(MOST_BYTES, int(SHARE_OF_DISK * (free_bytes(self.folder) + self.used_bytes())))

    def used_bytes(self) -> int:
        """Bytes of all snapshots, and of those that are being written."""
        return sum(size for _, size, _ in self._files(temporaries=True))

    def find(
        self, model_fingerprint: str, settings_key: str, token_ids: Sequence[int] | Tokens,
        *, most_unwanted: int | None = None,
    ) -> Match | None:  # fmt: skip
        """The snapshot with the longest common prefix with ``token_ids``; of several, the one with the fewest tokens.

        ``most_unwanted``: only snapshots of which so many last tokens or fewer are not wanted, for caches that cannot
        forget more; None: they can forget all.
        Damaged files are removed and told of. Other processes may remove what was found: see `open`.
        """
        wanted = token_array(token_ids)
        best: Match | None = None
        for path in sorted((self.folder / folder_name(model_fingerprint, settings_key)).glob(f"*{SUFFIX}")):
            match = self._compare(path, model_fingerprint, settings_key, wanted)
            if match is None or (most_unwanted is not None and match.tokens - match.common_tokens > most_unwanted):
                continue
            if best is None or (match.common_tokens, -match.tokens) > (best.common_tokens, -best.tokens):
                best = match
        return best

    def open(self, path: Path, *, threads: int = 1) -> Snapshot:
        """Opens a snapshot for use, which counts as its last use and protects it until it is closed.

        Raises:
            SnapshotError: it is damaged, or was removed meanwhile; read the document instead.
        """
        snapshot = Snapshot.open(path, threads=threads)
        self.touch(path)
        return snapshot

    def save(
        self,
        subject: Subject,
        token_ids: Sequence[int] | Tokens,
        sections: Iterable[SectionToWrite],
        *,
        bytes_needed: int = 0,
        extra: Mapping[str, Any] | None = None,
        threads: int = 1,
    ) -> Path:
        """Writes the snapshot of these tokens and returns its path; one that is there already is left as it is.

        The section ``tokens`` is added. ``bytes_needed`` is what the sections have before coding: the least recently
        used snapshots are removed first to keep the limit.

        Raises:
            StorageError: the folder or disk cannot take it, or the limit has no room for it. Nothing is left behind.
        """
        tokens = token_array(token_ids)
        final = self.folder / folder_name(subject.model_fingerprint, subject.settings_key) / file_name(tokens)
        make_folder(final.parent)
        with storage_errors(final.parent):
            self.remove_leftovers()
            lock = file_lock(final.with_suffix(_LOCK_SUFFIX), "saving a snapshot of the same document",
                             notice=self._notice, patience_seconds=_PATIENCE_SECONDS)
            with lock:
                if self._holds(final, subject, tokens):
                    self.touch(final)
                    return final
                self._make_room(bytes_needed + tokens.nbytes, keep=final)
                with SnapshotWriter(final, metadata_of(subject, tokens, extra or {}), bytes_needed=bytes_needed,
                                    threads=threads) as writer:
                    writer.add(TOKENS, [tokens])
                    for name, pieces, coding in sections:
                        writer.add(name, pieces, coding=coding)
        with contextlib.suppress(StorageError):  # other processes save as well; what is in use may stay
            self._make_room(0, keep=final)
        return final

    def touch(self, path: Path) -> None:
        """Notes that a snapshot was used now; in a folder that may only be read, nothing is noted."""
        with contextlib.suppress(OSError):
            os.utime(path)

    def list(self) -> Entries:
        """All snapshots, the last used first; those that cannot be opened have a ``problem``."""
        found = []
        for path, _, _ in self._files():
            try:
                with Snapshot.open(path) as snapshot:
                    found.append(Entry.of(snapshot))
            except SnapshotError as error:
                with contextlib.suppress(OSError):  # removed meanwhile
                    found.append(Entry.unusable(path, str(error)))
        return sorted(found, key=lambda entry: -entry.last_used)

    def remove(self, what: str | Path) -> Entries:
        """Removes one snapshot by its path or by 4 or more digits of its id, or all those of a document by its name.

        Raises:
            OptionError: no snapshot is meant, or several by an id too short.
            StorageError: it is in use, or the system refuses.
        """
        chosen = self.select(what)
        for entry in chosen:
            if not self._remove(entry.path):
                raise StorageError(f"the snapshot {entry.id} is in use by another process; close that first")
        return chosen

    def select(self, what: str | Path) -> Entries:
        """What `remove` would remove. Raises OptionError."""
        entries, name = self.list(), str(what)
        by_path = [entry for entry in entries if entry.path == Path(name).absolute()]
        by_document = [entry for entry in entries
                       if any(name in (document, Path(document).name) for document in entry.documents)]
        by_id = [entry for entry in entries if len(name) >= _SHORTEST_ID_PREFIX and entry.id.startswith(name.lower())]
        if not by_path and not by_document and len(by_id) > 1:
            raise OptionError(f"{name!r} begins several ids, {', '.join(e.id for e in by_id)}: give more digits")
        chosen = by_path or by_document or by_id
        if not chosen:
            raise OptionError(f"no snapshot has the document, path or id {name!r}; 'satchel cache list' shows them")
        return chosen

    def clear(self) -> tuple[int, int]:
        """Removes everything that is not in use: (files removed, files left because they are in use).

        Raises:
            StorageError: the system refuses.
        """
        self.remove_leftovers()
        removed = [self._remove(path) for path, _, _ in self._files()]
        for folder in self._folders():
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        return removed.count(True), removed.count(False)

    def remove_leftovers(self) -> None:
        """Removes temporary files and locks of processes that were killed."""
        for folder in self._folders():
            remove_stale(folder)
            for lock in folder.glob(f"*{_LOCK_SUFFIX}"):
                with contextlib.suppress(OSError):
                    _remove_unless_locked(lock)

    def _compare(self, path: Path, fingerprint: str, key: str, wanted: Tokens) -> Match | None:
        try:
            with Snapshot.open(path) as snapshot:
                entry = Entry.of(snapshot)
                if (entry.model_fingerprint, entry.settings_key) != (fingerprint, key):
                    return None
                head = head_of(wanted)
                if head and entry.head and head != entry.head:
                    return None
                data = snapshot.section(TOKENS, expected_bytes=4 * entry.tokens)
                common = _common_prefix(np.frombuffer(data, "<u4"), wanted)
        except SnapshotError as error:
            self._report(path, error)
            return None
        return Match(entry, common) if common else None

    def _report(self, path: Path, error: SnapshotError) -> None:
        if path in self._reported:
            return
        self._reported.add(path)
        if not error.damaged:
            if path.exists():
                self._notice(str(error))
            return
        removed = False
        with contextlib.suppress(StorageError):
            removed = self._remove(path)
        self._notice(f"{error}{' (removed)' if removed else ''}")

    def _holds(self, path: Path, subject: Subject, tokens: Tokens) -> bool:
        """Whether the snapshot of this very subject is there, whole."""
        if not path.exists():
            return False
        match = self._compare(path, subject.model_fingerprint, subject.settings_key, tokens)
        return match is not None and match.is_prefix and match.common_tokens == len(tokens)

    def _make_room(self, bytes_needed: int, keep: Path) -> None:
        """Removes the least recently used snapshots until ``bytes_needed`` more keep the limit."""
        limit = self.limit_bytes
        if bytes_needed > limit:
            raise StorageError(f"a snapshot of {format_size(bytes_needed, round_up=True)} is more than all snapshots "
                               f"may have together, {format_size(limit)}; raise --cache-limit or use --no-cache")
        over = self.used_bytes() + bytes_needed - limit
        for path, size, _ in sorted(self._files(), key=lambda file: file[2]):
            if over <= 0:
                return
            if path != keep and self._remove(path):
                over -= size
        if over > 0:
            raise StorageError(f"snapshots may have {format_size(limit)} together and those in use leave no room; "
                               "raise --cache-limit or close other sessions")

    def _remove(self, path: Path) -> bool:
        """Whether it is gone; if not, it is in use. Raises StorageError."""
        with storage_errors(path.parent):
            try:
                return _remove_unless_locked(path)
            except FileNotFoundError:
                return True

    def _folders(self) -> Iterator[Path]:
        try:
            yield from sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.is_symlink())
        except OSError:  # none was made yet, or it may not be read
            return

    def _files(self, *, temporaries: bool = False) -> _Files:
        found = []
        for folder in self._folders():
            patterns = [f"*{SUFFIX}", f"{TEMPORARY_PREFIX}*"] if temporaries else [f"*{SUFFIX}"]
            for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    found.append((path, status.st_size, status.st_mtime))
        return found


def _common_prefix(a: Tokens, b: Tokens) -> int:
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length


def _remove_unless_locked(path: Path) -> bool:
    """Whether the file is gone. Windows needs no lock for this: it refuses to remove what is open."""
    if sys.platform == "win32":
        try:
            path.unlink()
        except PermissionError:
            return False
        return True
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with contextlib.suppress(LockUnsupportedError):  # then an open file stays readable after its removal
            if not try_lock(descriptor):
                return False
        if is_linked(descriptor, path):  # else it was replaced or removed while we opened it
            path.unlink()
        return True
    finally:
        os.close(descriptor)
