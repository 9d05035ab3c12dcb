"""What runs a model: one file per engine."""

from __future__ import annotations

import importlib.util

from ...cache import CacheSettings
from ...errors import ModelError, OptionError
from ...export.package import Package
from .base import Cancelled, ConversationCache, Engine
from .native import NativeEngine
from .portable import PortableEngine
from .providers import DEVICES, find_device
from .rules import LLAMA_CPP, NATIVE

__all__ = [
    "DEVICES",
    "Cancelled",
    "ConversationCache",
    "Engine",
    "NativeEngine",
    "PortableEngine",
    "find_device",
    "open_engine",
    "require_engine",
]


def require_engine(engine: str) -> None:
    """Raises OptionError when a library that an engine needs is not installed: before a model is fetched for it."""
    if engine == LLAMA_CPP and importlib.util.find_spec("llama_cpp") is None:
        raise OptionError(
            f"--engine {LLAMA_CPP} needs llama-cpp-python, which is not installed; "
            'pip install "satchel[llama-cpp]" (it is compiled, which takes minutes)'
        )


def open_engine(
    package: Package, threads: int, settings: CacheSettings | None = None, device: str = "cpu", engine: str = NATIVE
) -> Engine:
    """The engine for a package. Raises ModelError when it cannot be loaded, OptionError for what it cannot do."""
    if engine == LLAMA_CPP:
        from .llama_cpp.engine import LlamaCppEngine  # of an extra

        return LlamaCppEngine(package, threads)
    if package.linked_file is not None:
        raise ModelError(
            f"{package.folder} has no weights of its own, only a link for --engine {LLAMA_CPP}; give the .gguf file "
            f"{package.linked_file}"
        )
    if package.manifest.flavour == "portable":
        return PortableEngine(package, threads, settings or CacheSettings(), device)
    if device != "cpu":
        raise ModelError(
            f"{package.folder} is of the {package.manifest.flavour} flavour, which runs on device cpu, not {device}; "
            "export the model with --flavour portable"
        )
    return NativeEngine(package, threads, settings)
