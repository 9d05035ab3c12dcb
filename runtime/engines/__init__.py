"""What runs a model: one file per engine."""

from __future__ import annotations

import importlib.util

from ...errors import ModelError, OptionError
from ...export.package import Package
from .base import Cancelled, ConversationCache, Engine
from .native import NativeEngine
from .rules import LLAMA_CPP, NATIVE

__all__ = ["Cancelled", "ConversationCache", "Engine", "NativeEngine", "open_engine", "require_engine"]


def require_engine(engine: str) -> None:
    """Raises OptionError when a library that an engine needs is not installed: before a model is fetched for it."""
    if engine == LLAMA_CPP and importlib.util.find_spec("llama_cpp") is None:
        raise OptionError(
            f"--engine {LLAMA_CPP} needs llama-cpp-python, which is not installed; "
            'pip install "satchel[llama-cpp]" (it is compiled, which takes minutes)'
        )


def open_engine(package: Package, threads: int, engine: str = NATIVE) -> Engine:
    """The engine of that name for a package. Raises ModelError when it cannot be loaded."""
    if engine == LLAMA_CPP:
        from .llama_cpp.engine import LlamaCppEngine  # of an extra

        return LlamaCppEngine(package, threads)
    if package.linked_file is not None:
        raise ModelError(
            f"{package.folder} has no weights of its own, only a link for --engine {LLAMA_CPP}; give the .gguf file "
            f"{package.linked_file}"
        )
    return NativeEngine(package, threads)
