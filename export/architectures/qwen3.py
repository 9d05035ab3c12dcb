"""Qwen3: each head's queries and keys are normalized before RoPE; in some files layers are windowed."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from .base import QUERY_KEY_VALUE, DecoderModel, decoder, read_windowed_spec


def read(source: Source) -> DecoderModel:
    spec = replace(read_windowed_spec(source), query_key_norm="head")
    return decoder(source, spec, biases=QUERY_KEY_VALUE)
