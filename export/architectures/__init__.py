"""Transformer families by the name that model files give them (``general.architecture``).

A new family is one file with a ``read`` function and one row here.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import ModelError
from ..sources import Source
from . import gemma2, gemma3, granite, llama, olmo2, phi3, qwen2, qwen3, qwen3moe, smollm3
from .base import DecoderModel, WeightRole

__all__ = ["ARCHITECTURES", "DecoderModel", "WeightRole", "read_model"]

ARCHITECTURES: dict[str, Callable[[Source], DecoderModel]] = {
    "gemma2": gemma2.read,
    "gemma3": gemma3.read,
    "granite": granite.read,
    "llama": llama.read,
    "olmo2": olmo2.read,
    "phi3": phi3.read,
    "qwen2": qwen2.read,
    "qwen3": qwen3.read,
    "qwen3moe": qwen3moe.read,
    "smollm3": smollm3.read,
}


def read_model(source: Source) -> DecoderModel:
    """The spec of the model in ``source`` and the place of each of its weights.

    Raises:
        ModelError: the architecture is not supported, or a key or tensor is missing, surplus, or of the wrong
            shape.
    """
    reader = ARCHITECTURES.get(source.architecture)
    if reader is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(
            f"{source.path} has the architecture {source.architecture!r} (general.architecture); supported are: {known}"
        )
    return reader(source)
