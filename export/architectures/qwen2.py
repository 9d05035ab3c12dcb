"""Qwen2 and Qwen2.5: half-split RoPE, biases on query, key and value, and in some files windowed layers."""

from __future__ import annotations

from ..sources import Source
from .base import QUERY_KEY_VALUE, DecoderModel, decoder, read_windowed_spec


def read(source: Source) -> DecoderModel:
    return decoder(source, read_windowed_spec(source), biases=QUERY_KEY_VALUE)
