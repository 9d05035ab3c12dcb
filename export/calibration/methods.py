"""The calibration methods by name: one file and one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ...devices.reporting import Progress
from ..package import Package
from .attention_gate import calibrate_attention_gate
from .cskv import METHOD as CSKV
from .cskv import calibrate_cskv
from .duo import METHOD as DUO
from .duo import calibrate_duo
from .kvzap import calibrate_kvzap
from .locret import calibrate_locret
from .razor import METHOD as RAZOR
from .razor import calibrate_razor
from .retention import ATTENTION_GATE, KVZAP, LOCRET
from .text import Order, Text


class Calibrate(Protocol):
    """Measures a package on a text, writes the result into it and returns the record (docs/calibration.md).

    ``progress`` is called with the stage ``calibrating`` and counts. Stopped, the same call goes on where it was.

    Raises:
        OptionError: torch is not installed, or the text is too short.
        ModelError: the model cannot be calibrated.
        StorageError: the package's folder cannot be written.
    """

    def __call__(
        self, package: Package, text: Text, order: Order, *, threads: int, progress: Progress | None = None
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Method:
    """``summary``: what it finds, and ``setting``: what uses that, for ``--help``."""

    summary: str
    setting: str
    calibrate: Calibrate


METHODS = {
    KVZAP: Method(
        "linear heads that foretell what a token's keys and values will be worth", "--policy kvzap", calibrate_kvzap
    ),
    LOCRET: Method(
        "small networks that foretell the same from queries, keys and values", "--policy locret", calibrate_locret
    ),
    ATTENTION_GATE: Method(
        "the same, with a small attention to the tokens that are read together", "--policy attention-gate",
        calibrate_attention_gate,
    ),
    RAZOR: Method("which KV heads look far back, on random tokens", "--kv heads=razor", calibrate_razor),
    DUO: Method("which KV heads answers need, by gates trained on planted passkeys", "--kv heads=duo", calibrate_duo),
    CSKV: Method("the few coefficients that tell most of a key or value", "--kv lowrank=cskv", calibrate_cskv),
}
