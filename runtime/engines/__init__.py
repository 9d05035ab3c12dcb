"""What runs a model: one file per engine."""

from __future__ import annotations

from ...export.package import Package
from .base import Cancelled, ConversationCache, Engine
from .native import NativeEngine

__all__ = ["Cancelled", "ConversationCache", "Engine", "NativeEngine", "open_engine"]


def open_engine(package: Package, threads: int) -> Engine:
    """The engine for a package. Raises ModelError when it cannot be loaded."""
    return NativeEngine(package, threads)
