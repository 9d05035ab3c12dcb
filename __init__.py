"""Satchel: ask questions about documents longer than your machine could hold, inside one memory limit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    ClosedError,
    ContextLengthError,
    DocumentError,
    DownloadError,
    MemoryLimitError,
    ModelError,
    OptionError,
    SatchelError,
    SnapshotError,
    StorageError,
)

if TYPE_CHECKING:
    from .runtime import Answer, Context, Model, Usage, load

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "ClosedError",
    "Context",
    "ContextLengthError",
    "DocumentError",
    "DownloadError",
    "MemoryLimitError",
    "Model",
    "ModelError",
    "OptionError",
    "SatchelError",
    "SnapshotError",
    "StorageError",
    "Usage",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """The runtime is loaded at first use: `satchel models` and `--help` need no inference engine."""
    if name in ("Answer", "Context", "Model", "Usage", "load"):
        return getattr(import_module(".runtime", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
