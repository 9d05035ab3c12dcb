"""Every error that Satchel raises on purpose, in one tree.

A message names the bad value, the limit and the remedy, in one line; the command line prints it and exits with 1.
``assert`` and other exceptions are for our own bugs.
"""

from __future__ import annotations


class SatchelError(Exception):
    """The root: catch this to catch everything that Satchel raises on purpose."""


class OptionError(SatchelError):
    """An option or setting has a value that is not known or not supported."""


class ModelError(SatchelError):
    """A model file or package is unreadable, damaged, or of a kind that is not supported."""


class DownloadError(SatchelError):
    """A model could not be fetched, or what was fetched is not what the registry promises."""


class DocumentError(SatchelError):
    """A document cannot be read as text."""


class MemoryLimitError(SatchelError):
    """The work does not fit into the memory limit; ``smallest_bytes`` is the least limit that would do."""

    def __init__(self, message: str, *, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class ContextLengthError(SatchelError):
    """The text is longer than the model's trained context."""


class StorageError(SatchelError):
    """A folder or disk cannot take what must be written (no space, no permission)."""


class SnapshotError(StorageError):
    """A snapshot of a read document cannot be used; ``damaged`` tells whether it should be removed."""

    def __init__(self, message: str, *, damaged: bool = True) -> None:
        super().__init__(message)
        self.damaged = damaged


class ClosedError(SatchelError):
    """A model or context was used after it was closed."""
