"""Qwen3: each head's queries and keys are normalized before RoPE."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from .base import QUERY_KEY_VALUE, DecoderModel, decoder, read_spec


def read(source: Source) -> DecoderModel:
    return decoder(source, replace(read_spec(source), query_key_norm="head"), biases=QUERY_KEY_VALUE)
