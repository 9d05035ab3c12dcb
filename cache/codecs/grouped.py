"""Offset and scale for every channel of 16 neighbours: 4, 3 and 2 bits, 72, 56 and 40 bytes a token at D = 64.

Neighbouring tokens lie closer together than the whole document, channel by channel: with 4 bits the error of q.k is a
third smaller than that of `q4`, for 4 bytes more. After KIVI (arXiv 2402.02750), which gives each group of a channel of
keys a zero and a scale in half precision (8 bytes a token for groups of 32). Departures: both take 4 bits, against the
head's statistics; keys are quantized before RoPE; values are grouped by channel as keys are.
"""

from __future__ import annotations

from typing import ClassVar

from ... import kernels
from .base import Codec


class _Grouped(Codec):
    paper = "KIVI, arXiv 2402.02750"
    bits: ClassVar[int]

    def low(self, head_size: int) -> kernels.NativeCodec:
        del head_size
        return kernels.NativeCodec(key_bits=self.bits, value_bits=self.bits, grouped=True)


class Grouped4(_Grouped):
    name = "grouped4"
    bits = 4


class Grouped3(_Grouped):
    name = "grouped3"
    bits = 3


class Grouped2(_Grouped):
    name = "grouped2"
    bits = 2
