"""Phi-3: fused query, key and value, fused gate and up; some have a window in all layers, some LongRoPE.

LongRoPE: Ding et al. 2024 (arXiv 2402.13753). The released code takes other factors for texts within the original
context than for longer ones, which cannot be changed while a cache grows: the long ones are taken for all.
"""

from __future__ import annotations

from ..sources import Source
from .base import DecoderModel, decoder, read_windowed_spec


def read(source: Source) -> DecoderModel:
    return decoder(source, read_windowed_spec(source), fused=True)
