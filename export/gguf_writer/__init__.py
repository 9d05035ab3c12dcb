"""GGUF out: from any source to one .gguf file that stock llama.cpp loads, with our settings beside its own."""

from __future__ import annotations

from .writer import GgufFile, export_gguf

__all__ = ["GgufFile", "export_gguf"]
