"""Llama and the many that share its form (SmolLM, Mistral, TinyLlama, …)."""

from __future__ import annotations

from ..sources import Source
from .base import DecoderModel, read_decoder


def read(source: Source) -> DecoderModel:
    """llama.cpp stores the query and key rows of this family permuted for interleaved RoPE: where the source
    says so, they are put back.
    """
    return read_decoder(
        source,
        tensor_biases=("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    )
