"""KVQuant (arXiv 2401.18079) in 4, 3 and 2 bits: keys before RoPE, levels found by k-means, 1 % outliers kept apart.

At D = 64 a token has 74, 58 and 42 bytes. Departures: levels come without Fisher weights (they need gradients); every
token has a scale of its own, for keys too, on top of the channels' statistics (in the paper a key channel is quantized
alone); outliers are the largest of a block of 16 tokens. The first tokens are sinks, which stay in the hot tier.
"""

from __future__ import annotations

from typing import ClassVar

from ... import kernels
from .base import Codec


class _KVQuant(Codec):
    paper = "KVQuant, arXiv 2401.18079"
    bits: ClassVar[int]

    def low(self, head_size: int) -> kernels.NativeCodec:
        outliers = (kernels.BLOCK_TOKENS * head_size + 99) // 100  # 1 %, rounded up
        return kernels.NativeCodec(key_bits=self.bits, value_bits=self.bits, nonuniform=True, outliers=outliers)


class KVQuant4(_KVQuant):
    name = "kvquant4"
    bits = 4


class KVQuant3(_KVQuant):
    name = "kvquant3"
    bits = 3


class KVQuant2(_KVQuant):
    name = "kvquant2"
    bits = 2
