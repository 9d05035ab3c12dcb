"""Who is evaluated: our runtime with one policy or another, or llama.cpp with a type of its KV cache.

A side is named before anything is loaded (`Side`), and opened once for all its samples (`Runner`). All sides read the
same token ids, of our template and tokenizer, and answer greedily.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...devices.reporting import Progress
from ...errors import OptionError
from ..engines.rules import NATIVE
from ..options import Options
from .task import Sample

PEER = "llama.cpp"
KV_TYPES = ("f16", "q8_0", "q4_0")
FULL, NOBODY = "full", "none"


@dataclass(frozen=True)
class Side:
    """``label`` names it for people; ``policy``, ``kv`` and ``memory`` are of `load`, ``kv_type`` is llama.cpp's."""

    label: str
    policy: str = ""
    kv: Mapping[str, object] = field(default_factory=dict)
    memory: str | int | None = None
    kv_type: str = ""
    engine: str = NATIVE

    @property
    def identity(self) -> dict[str, Any]:
        """What results depend on."""
        if self.kv_type:
            return {"engine": PEER, "kv_type": self.kv_type}
        kv = {key: str(value) for key, value in sorted(self.kv.items())}
        runs_on = {} if self.engine == NATIVE else {"runs_on": self.engine}
        return {"engine": "satchel", "policy": self.policy, "kv": kv, "memory": self.memory, **runs_on}

    @property
    def reference(self) -> str:
        """The label of the same runtime's full cache."""
        return f"{PEER}:{KV_TYPES[0]}" if self.kv_type else FULL

    def check(self, threads: int | None) -> None:
        """Raises OptionError for a setting that `load` would refuse."""
        if not self.kv_type:
            Options.check(self.memory, self.policy, self.kv, threads, "cpu", None, self.engine)


def name_sides(
    policy: str, kv: Mapping[str, object], memory: str | int | None, against: Sequence[str], engine: str = NATIVE
) -> tuple[Side, ...]:
    """The evaluated side, then those that it is compared with.

    ``full`` in ``against`` has no other settings, so that all runs share its results; another policy has those of the
    evaluated side. Policy ``full`` with settings is ``full (as set)``: it is not what others are measured from.

    Raises:
        OptionError: a name is not known.
    """
    plain, own = Side(FULL, FULL, engine=engine), Side(policy, policy, dict(kv), memory, engine=engine)
    if policy == FULL and own.identity != plain.identity:
        own = replace(own, label=f"{FULL} (as set)")
    sides = [own]
    names = [name.strip() for entry in against for name in entry.split(",")]
    if NOBODY in names and len(names) > 1:
        raise OptionError(f"--against {NOBODY} excludes {', '.join(name for name in names if name != NOBODY)}")
    for name in names:
        if name == NOBODY:
            continue
        peer, _, kv_type = name.partition(":")
        if peer == PEER and (kv_type or KV_TYPES[0]) not in KV_TYPES:
            raise OptionError(f"llama.cpp's KV type {kv_type!r} is not known; choose one of {', '.join(KV_TYPES)}")
        if peer == PEER:
            side = Side(f"{PEER}:{kv_type or KV_TYPES[0]}", kv_type=kv_type or KV_TYPES[0])
        elif name == FULL:
            side = plain
        else:
            side = Side(name, name, dict(kv), memory, engine=engine)
        if side.identity not in [other.identity for other in sides]:
            sides.append(side)
    return tuple(sides)


@dataclass(frozen=True)
class Reply:
    """An answer and what it took. ``decode_seconds`` are those after the first new token."""

    text: str
    new_tokens: int
    ttft_seconds: float
    decode_seconds: float
    finish_reason: str


@dataclass(frozen=True)
class Talk:
    """A whole conversation. ``kv``: bytes and tokens by tier after the last answer, as in ``ask --json``; ``plan``: how
    it was read (of our runtime)."""

    document_tokens: int
    read_seconds: float
    replies: tuple[Reply, ...]
    kv: Mapping[str, int]
    plan: Mapping[str, int | str | None] = field(default_factory=dict)


class Runner(Protocol):
    """A side with its model loaded."""

    @property
    def vocab(self) -> int:
        """Entries of a row of logits."""

    def talk(self, sample: Sample, progress: Progress) -> Talk:
        """Reads the document, then asks the questions in one conversation. Raises Cancelled."""

    def walk(self, ids: Sequence[int], positions: Sequence[int], progress: Progress) -> Iterator[NDArray[np.float32]]:
        """Reads ``ids``; float32 [vocab] logits after each of the ascending ``positions``. Raises Cancelled.

        What lies between two positions is read as one chunk, where the plan's chunk is that long.
        """

    def kv(self) -> Mapping[str, int]:
        """Bytes and tokens by tier at the end of the last `walk`."""

    def plan(self) -> Mapping[str, int | str | None]:
        """How the last `walk` read; nothing of another runtime."""

    def cancel(self) -> None:
        """Stops what is under way, from any thread."""

    def close(self) -> None:
        """Gives the model back."""
