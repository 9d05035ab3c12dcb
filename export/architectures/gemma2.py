"""Gemma 2: every other layer sees a window; attention and final logits are capped; norms around each sublayer."""

from __future__ import annotations

import math
from dataclasses import replace

from ..sources import Source
from ..spec import ModelSpec
from .base import DecoderModel, Keys, decoder, read_windowed_spec

LAYERS_OF_27B = 46
PERIOD = 2


def read(source: Source) -> DecoderModel:
    return decoder(source, read_gemma_spec(source, PERIOD, LAYERS_OF_27B))


def read_gemma_spec(source: Source, period: int, layers_of_27b: int) -> ModelSpec:
    """What Gemma 2 and 3 share. The attention scale of the 27B models is that of hidden / heads, which files of so
    many layers do not say.
    """
    spec = read_windowed_spec(source, period)
    scale = spec.attention_scale
    if spec.layers == layers_of_27b and Keys(source).get("attention.scale") is None:
        scale = math.sqrt(spec.heads / spec.hidden)
    return replace(
        spec,
        attention_scale=scale,
        embedding_multiplier=math.sqrt(spec.hidden),
        activation="gelu_tanh",
        norm_places="both",
    )
