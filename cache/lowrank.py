"""Low rank below the hot tier: archived keys and values as a few coefficients, which the codec then encodes.

The hot tier is the full-precision window that CSKV (arXiv 2409.10593) wants beside its low-rank form. Projections, of a
key and its value together, come from a calibration of the model (``cskv``), or keys are pruned to some of their
channels, which the queries at hand choose (``think``: ThinK, arXiv 2407.21018; no calibration). What digests are made
of stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .. import kernels
from .codecs import Codec

NO_LOWRANK, CSKV, THINK = "none", "cskv", "think"
_PAPERS = {CSKV: "CSKV, arXiv 2409.10593", THINK: "ThinK, arXiv 2407.21018"}
LOWRANKS = (NO_LOWRANK, *_PAPERS)
DEFAULT_PERCENT = 50
LEAST_RANK = 4  # as kernels/native/lowrank.h has it


@dataclass(frozen=True)
class LowRank:
    """``percent`` of the channels are kept: of keys and values, or with ``think`` of keys alone.

    ``basis``: of ``cskv``, for every KV head of the layers that see everything, cut to the `ranks`; ``sha256``: of the
    calibration that it comes from.
    """

    name: str
    percent: int
    basis: kernels.LowRankBasis | None = field(default=None, compare=False)
    sha256: str = ""

    def ranks(self, head_size: int) -> tuple[int, int]:
        """Coefficients on the keys' and on the values' side of a block; 0: all channels as they are."""
        rank = rank_of(self.percent, head_size)
        return (rank, 0) if self.name == THINK else (rank, rank)

    @property
    def paper(self) -> str:
        """Where it is from."""
        return _PAPERS[self.name]

    @property
    def key(self) -> Mapping[str, str]:
        """What snapshots depend on."""
        calibrated = {"lowrank_basis": self.sha256} if self.sha256 else {}
        return {"lowrank": self.name, "rank": str(self.percent), **calibrated}


def lowrank_names() -> tuple[str, ...]:
    """All of them."""
    return tuple(_PAPERS)


def find_lowrank(name: str) -> LowRank:
    """One of `lowrank_names` as it is by default, without a basis."""
    return LowRank(name, DEFAULT_PERCENT)


def rank_of(percent: int, head_size: int) -> int:
    """Channels that are so many percent of ``head_size``, to the nearest; at least `LEAST_RANK`."""
    return max(LEAST_RANK, (head_size * percent + 50) // 100)


def low_form(codec: Codec, head_size: int, lowrank: LowRank | None) -> kernels.NativeCodec:
    """The form of most blocks, as `Codec.low` with the ranks."""
    return _ranked(codec.low(_numbers(head_size, lowrank)), head_size, lowrank)


def high_form(codec: Codec, head_size: int, lowrank: LowRank | None) -> kernels.NativeCodec:
    """The form of the highest-scored blocks, as `Codec.high` with the ranks."""
    return _ranked(codec.high(_numbers(head_size, lowrank)), head_size, lowrank)


def bytes_per_token(codec: Codec, head_size: int, lowrank: LowRank | None = None) -> float:
    """As `Codec.bytes_per_token`, with the ranks."""
    return codec.mean_bytes(low_form(codec, head_size, lowrank), high_form(codec, head_size, lowrank), head_size)


def _numbers(head_size: int, lowrank: LowRank | None) -> int:
    """What codecs take for the head size: most numbers that a block has of a key or value."""
    if lowrank is None:
        return head_size
    return max(rank or head_size for rank in lowrank.ranks(head_size))


def _ranked(form: kernels.NativeCodec, head_size: int, lowrank: LowRank | None) -> kernels.NativeCodec:
    if lowrank is None:
        return form
    key_rank, value_rank = lowrank.ranks(head_size)
    return kernels.NativeCodec(
        key_bits=form.key_bits, value_bits=form.value_bits, nonuniform=form.nonuniform, outliers=form.outliers,
        grouped=form.grouped, key_rank=key_rank, value_rank=value_rank,
    )  # fmt: skip
