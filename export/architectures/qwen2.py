"""Qwen2 and Qwen2.5: half-split RoPE, and biases on query, key and value."""

from __future__ import annotations

from ..sources import Source
from .base import QUERY_KEY_VALUE, DecoderModel, decoder, read_spec


def read(source: Source) -> DecoderModel:
    return decoder(source, read_spec(source), biases=QUERY_KEY_VALUE)
