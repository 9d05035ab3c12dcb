"""Llama 1 to 3 and the many that share its form (SmolLM, Mistral with its window, TinyLlama, …)."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from .base import ALL_LINEARS, DecoderModel, Keys, decoder, read_spec


def read(source: Source) -> DecoderModel:
    """Mistral's first models see a window of each text, in all layers."""
    spec = read_spec(source)
    return decoder(
        source, replace(spec, attention_windows=Keys(source).windows(spec.layers)), biases=ALL_LINEARS
    )
