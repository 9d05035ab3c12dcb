"""Gemma 3: five layers of six see a window and turn by another RoPE base; norms around each sublayer."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from ..spec import RopeSpec
from .base import DecoderModel, Keys, decoder
from .gemma2 import read_gemma_spec

LAYERS_OF_27B = 62
PERIOD = 6


def read(source: Source) -> DecoderModel:
    """The scaling of RoPE, where there is one, is that of the layers that see everything."""
    spec = read_gemma_spec(source, PERIOD, LAYERS_OF_27B)
    window_rope = RopeSpec(Keys(source).number("rope.freq_base_swa", 10000.0), spec.rope.dims)
    return decoder(source, replace(spec, window_rope=window_rope, query_key_norm="head"))
