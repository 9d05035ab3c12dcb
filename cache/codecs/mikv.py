"""MiKV (arXiv 2402.18096): what scored high among the demoted gets more bits. 63 bytes a token at D = 64.

Of every 4 consecutive blocks the one with the highest score is stored as `q8` does, the other three as `grouped2` does.
Departures: the paper chooses token by token and keeps the important ones in float; here whole blocks are chosen, and
what matters most is in the hot tier anyway.
"""

from __future__ import annotations

from ... import kernels
from .base import Codec
from .grouped import Grouped2
from .q8 import Q8


class MiKV(Codec):
    name = "mikv"
    paper = "MiKV, arXiv 2402.18096"
    high_blocks = 1
    group_blocks = 4

    def low(self, head_size: int) -> kernels.NativeCodec:
        return Grouped2().low(head_size)

    def high(self, head_size: int) -> kernels.NativeCodec:
        return Q8().low(head_size)
