"""SmolLM3: Llama in which every fourth layer has no rotary positions."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from .base import ALL_LINEARS, DecoderModel, decoder, read_spec

PERIOD = 4


def read(source: Source) -> DecoderModel:
    spec = read_spec(source)
    unrotated = tuple(range(PERIOD - 1, spec.layers, PERIOD))
    return decoder(source, replace(spec, unrotated_layers=unrotated), biases=ALL_LINEARS)
