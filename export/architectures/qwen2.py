"""Qwen2 and Qwen2.5: half-split RoPE, biases on query, key and value, and in some files windowed layers."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from .base import QUERY_KEY_VALUE, DecoderModel, Keys, decoder, read_spec


def read(source: Source) -> DecoderModel:
    spec = read_spec(source)
    windows = Keys(source).windows(spec.layers)
    return decoder(source, replace(spec, attention_windows=windows), biases=QUERY_KEY_VALUE)
