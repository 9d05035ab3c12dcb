"""4 bits, evenly spaced: 68 bytes a token at D = 64, 3.8 times less than f16.

Channels are centred and scaled by the head's statistics; every token has a scale for its key and one for its value.
"""

from __future__ import annotations

from ... import kernels
from .base import Codec


class Q4(Codec):
    name = "q4"
    paper = "KVQuant, arXiv 2401.18079 (keys before RoPE, per-channel statistics), with even levels"

    def low(self, head_size: int) -> kernels.NativeCodec:
        del head_size
        return kernels.NativeCodec(key_bits=4, value_bits=4)
