"""Qwen3's mixtures of experts: Qwen3 with a router and experts in place of each feed-forward block."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from .base import DecoderModel, decoder, read_experts, read_spec


def read(source: Source) -> DecoderModel:
    experts = read_experts(source)
    inner = experts.used * experts.width
    spec = replace(read_spec(source), query_key_norm="head", experts=experts, feed_forward=inner)
    return decoder(source, spec)
