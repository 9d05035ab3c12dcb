"""Gemma 2: every other layer sees a window; attention and final logits are capped; norms around each sublayer."""

from __future__ import annotations

import math
from dataclasses import replace

from ..sources import Source
from .base import DecoderModel, Keys, decoder, read_spec

LAYERS_OF_27B = 46  # whose attention scale is that of hidden / heads; the files do not say
PERIOD = 2


def read(source: Source) -> DecoderModel:
    spec, keys = read_spec(source), Keys(source)
    scale = spec.attention_scale
    if spec.layers == LAYERS_OF_27B and keys.get("attention.scale") is None:
        scale = math.sqrt(spec.heads / spec.hidden)
    spec = replace(
        spec,
        attention_scale=scale,
        attention_windows=keys.windows(spec.layers, PERIOD),
        embedding_multiplier=math.sqrt(spec.hidden),
        activation="gelu_tanh",
        norm_places="both",
    )
    return decoder(source, spec)
