"""Qwen2 and Qwen2.5: half-split RoPE, and biases on query, key and value."""

from __future__ import annotations

from ..sources import Source
from .base import DecoderModel, read_decoder


def read(source: Source) -> DecoderModel:
    return read_decoder(source, tensor_biases=("attn_q", "attn_k", "attn_v"))
