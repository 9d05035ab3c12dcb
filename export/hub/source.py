"""What a source of models is: one file per source, tried one after another by ``download.fetch``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...devices.reporting import Notice, Progress
from .part_file import PartFile
from .registry import ModelEntry


class SourceError(Exception):
    """This source cannot give the model; the text says why. The next source is tried."""


class WrongContentError(SourceError):
    """What the source gave is not what it promised; ``resumed``: part of it came from an earlier run."""

    def __init__(self, message: str, *, resumed: bool) -> None:
        super().__init__(message)
        self.resumed = resumed


@dataclass(frozen=True)
class Job:
    """One model to be fetched; ``target`` is the final path, ``progress`` and ``notice`` go to the person."""

    entry: ModelEntry
    target: Path
    progress: Progress
    notice: Notice


@dataclass(frozen=True)
class Fetched:
    """A complete and verified part file, closed and on the disk."""

    part: Path
    sha256: str


class Source(Protocol):
    """A place that has models. ``label`` is how messages call it, ``key`` how file names do."""

    label: str
    key: str

    def fetch(self, job: Job) -> Fetched:
        """Fetches the model into a part file beside the target.

        Raises:
            SourceError: this source cannot.
            StorageError: the disk cannot take it; no other source is tried.
        """
        ...


def check_content(part: PartFile, expected_sha256: str, promised_by: str) -> Fetched:
    """Syncs a complete part whose hash is right; removes one whose hash is wrong.

    Raises:
        WrongContentError: the hash differs; both are in the message.
    """
    if part.sha256 != expected_sha256:
        part.discard()
        raise WrongContentError(f"wrong content: SHA-256 expected {expected_sha256} ({promised_by}), got "
                                f"{part.sha256}; nothing of it was kept", resumed=part.resumed)
    part.sync()
    return Fetched(part.path, part.sha256)


SourceFactory = Callable[[], Source]
