"""8 bits, evenly spaced: 132 bytes a token at D = 64, half of f16. Answers as f16 does, as far as we could measure.

Channels are centred and scaled by the head's statistics; every token has a scale for its key and one for its value.
"""

from __future__ import annotations

from ... import kernels
from .base import Codec


class Q8(Codec):
    name = "q8"
    paper = "KVQuant, arXiv 2401.18079 (keys before RoPE, per-channel statistics), with even levels"

    def low(self, head_size: int) -> kernels.NativeCodec:
        del head_size
        return kernels.NativeCodec(key_bits=8, value_bits=8)
