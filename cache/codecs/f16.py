"""IEEE half floats: 256 bytes a token at D = 64. The reference for the others."""

from __future__ import annotations

from ... import kernels
from .base import Codec


class F16(Codec):
    name = "f16"
    paper = "none: half floats as they are"

    def low(self, head_size: int) -> kernels.NativeCodec:
        del head_size
        return kernels.NativeCodec(key_bits=16, value_bits=16)
