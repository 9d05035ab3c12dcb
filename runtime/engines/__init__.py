"""What runs a model: one file per engine."""

from __future__ import annotations

from ...cache import CacheSettings
from ...errors import ModelError
from ...export.package import Package
from .base import Cancelled, ConversationCache, Engine
from .native import NativeEngine
from .portable import PortableEngine
from .providers import DEVICES, find_device

__all__ = [
    "DEVICES",
    "Cancelled",
    "ConversationCache",
    "Engine",
    "NativeEngine",
    "PortableEngine",
    "find_device",
    "open_engine",
]


def open_engine(package: Package, threads: int, settings: CacheSettings | None = None, device: str = "cpu") -> Engine:
    """The engine for a package. Raises ModelError when it cannot be loaded, OptionError for what it cannot do."""
    if package.manifest.flavour == "portable":
        return PortableEngine(package, threads, settings or CacheSettings(), device)
    if device != "cpu":
        raise ModelError(
            f"{package.folder} is of the {package.manifest.flavour} flavour, which runs on device cpu, not {device}; "
            "export the model with --flavour portable"
        )
    return NativeEngine(package, threads)
