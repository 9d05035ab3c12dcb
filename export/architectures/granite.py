"""Granite 3: Llama with multipliers on the embedding, on what each sublayer adds, and on attention and logits."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from .base import ALL_LINEARS, DecoderModel, Keys, decoder, read_spec


def read(source: Source) -> DecoderModel:
    """The files name what the logits are divided by."""
    keys = Keys(source)
    spec = replace(
        read_spec(source),
        embedding_multiplier=keys.number("embedding_scale", 1.0) or 1.0,
        residual_multiplier=keys.number("residual_scale", 1.0) or 1.0,
        logits_multiplier=1.0 / (keys.number("logit_scale", 1.0) or 1.0),
    )
    return decoder(source, spec, biases=ALL_LINEARS)
