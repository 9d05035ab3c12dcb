"""Gemma 3: five layers of six see a window and turn by another RoPE base; norms around each sublayer."""

from __future__ import annotations

import math
from dataclasses import replace

from ..sources import Source
from ..spec import RopeSpec
from .base import DecoderModel, Keys, decoder, read_spec

LAYERS_OF_27B = 62  # whose attention scale is that of hidden / heads; the files do not say
PERIOD = 6


def read(source: Source) -> DecoderModel:
    """The scaling of RoPE, where there is one, is that of the layers that see everything."""
    spec, keys = read_spec(source), Keys(source)
    scale = spec.attention_scale
    if spec.layers == LAYERS_OF_27B and keys.get("attention.scale") is None:
        scale = math.sqrt(spec.heads / spec.hidden)
    spec = replace(
        spec,
        attention_scale=scale,
        attention_windows=keys.windows(spec.layers, PERIOD),
        window_rope=RopeSpec(keys.number("rope.freq_base_swa", 10000.0), spec.rope.dims),
        embedding_multiplier=math.sqrt(spec.hidden),
        activation="gelu_tanh",
        norm_places="both",
        query_key_norm="head",
    )
    return decoder(source, spec)
