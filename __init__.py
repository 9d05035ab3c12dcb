"""Satchel: ask questions about documents longer than your machine could hold, inside one memory limit."""

from __future__ import annotations

from .errors import (
    ClosedError,
    ContextLengthError,
    DocumentError,
    DownloadError,
    MemoryLimitError,
    ModelError,
    OptionError,
    SatchelError,
    StorageError,
)
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
    "StorageError",
    "Usage",
    "__version__",
    "load",
]
