"""Llama 1 to 3 and the many that share its form (SmolLM, Mistral with its window, TinyLlama, …)."""

from __future__ import annotations

from ..sources import Source
from .base import ALL_LINEARS, DecoderModel, decoder, read_windowed_spec


def read(source: Source) -> DecoderModel:
    """Mistral's first models see a window of each text, in all layers."""
    return decoder(source, read_windowed_spec(source), biases=ALL_LINEARS)
