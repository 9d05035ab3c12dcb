"""2 bits, evenly spaced: 36 bytes a token at D = 64, 7.1 times less than f16. Coarse: fit for what is rarely recalled.

Channels are centred and scaled by the head's statistics; every token has a scale for its key and one for its value.
"""

from __future__ import annotations

from ... import kernels
from .base import Codec


class Q2(Codec):
    name = "q2"
    paper = "KVQuant, arXiv 2401.18079 (keys before RoPE, per-channel statistics), with even levels"

    def low(self, head_size: int) -> kernels.NativeCodec:
        del head_size
        return kernels.NativeCodec(key_bits=2, value_bits=2)
