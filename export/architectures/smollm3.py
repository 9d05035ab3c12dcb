"""SmolLM3: Llama in which some layers, every fourth one, have no rotary positions."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from .base import ALL_LINEARS, DecoderModel, Keys, decoder, read_spec

PERIOD = 4


def read(source: Source) -> DecoderModel:
    """``rope.layers``, one truth value per layer, goes before the usual period."""
    spec = read_spec(source)
    rotated = Keys(source).flags("rope.layers", spec.layers)
    rotated = rotated or [(layer + 1) % PERIOD != 0 for layer in range(spec.layers)]
    unrotated = tuple(layer for layer in range(spec.layers) if not rotated[layer])
    return decoder(source, replace(spec, unrotated_layers=unrotated), biases=ALL_LINEARS)
