"""Qwen3: each head's queries and keys are normalized before RoPE; in some files layers are windowed."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from .base import QUERY_KEY_VALUE, DecoderModel, Keys, decoder, read_spec


def read(source: Source) -> DecoderModel:
    spec = read_spec(source)
    windows = Keys(source).windows(spec.layers)
    spec = replace(spec, query_key_norm="head", attention_windows=windows)
    return decoder(source, spec, biases=QUERY_KEY_VALUE)
