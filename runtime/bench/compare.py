"""Measures sides in turn, A B A B, and makes medians and ratios of what they say.

Every measurement is a fresh process. A machine drifts by tens of percent within an hour, so only figures
taken in one run, side beside side, may be divided by each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any, Protocol

from ...devices.reporting import Notice, Progress
from .process import run_worker

RATIOS = {
    "prefill": "prefill_tokens_per_second",
    "decode": "decode_tokens_per_second",
    "peak_rss": "peak_rss_bytes",
    "kv_bytes": "kv_bytes",
}


@dataclass(frozen=True)
class Figures:
    """What one side reached: the median of each figure over its runs."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    ttft_seconds: float
    peak_rss_bytes: int
    kv_bytes: int

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]]) -> Figures:
        middle = {field.name: median(result[field.name] for result in results) for field in fields(cls)}
        whole = {name: int(middle[name]) for name in ("peak_rss_bytes", "kv_bytes")}
        return cls(**{**middle, **whole})


@dataclass(frozen=True)
class Side:
    """``key`` names it in JSON, ``label`` for people; the worker gets ``engine`` and ``options``."""

    key: str
    label: str
    engine: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """Figures and settings by the sides' keys, in the order in which they were measured."""

    context: int
    runs: int
    figures: Mapping[str, Figures]
    settings: Mapping[str, Any]

    @property
    def ratio(self) -> dict[str, float]:
        """The first side's figures divided by the second's; empty when there is only one."""
        if len(self.figures) < 2:
            return {}
        ours, theirs = list(self.figures.values())[:2]
        return {short: getattr(ours, name) / getattr(theirs, name) for short, name in RATIOS.items()}

    def to_json(self) -> dict[str, Any]:
        """As ``satchel bench --json``."""
        found: dict[str, Any] = {"context": self.context, "runs": self.runs}
        found |= {key: asdict(figures) for key, figures in self.figures.items()}
        if self.ratio:
            found["ratio"] = self.ratio
        return {**found, "settings": dict(self.settings)}


class Measure(Protocol):
    """As `run_worker`."""

    def __call__(
        self, job: Mapping[str, Any], *, label: str, progress: Progress, notice: Notice
    ) -> dict[str, Any]: ...


def compare(
    sides: Sequence[Side],
    ids: Sequence[int],
    *,
    runs: int,
    threads: int,
    decode_tokens: int,
    progress: Progress,
    notice: Notice,
    measure: Measure = run_worker,
) -> Report:
    """Measures every side ``runs`` times over the same ``ids``.

    Raises:
        SatchelError: a measurement failed; the others are then not worth finishing.
    """
    results: dict[str, list[dict[str, Any]]] = {side.key: [] for side in sides}
    told: set[str] = set()

    def once(text: str) -> None:
        if text not in told:  # every run of a side says the same
            told.add(text)
            notice(text)

    for run in range(1, runs + 1):
        for side in sides:
            where = f"run {run} of {runs}, {side.label}"
            progress(f"{where}: loading", 0, len(ids))
            job = {
                "engine": side.engine,
                "ids": list(ids),
                "threads": threads,
                "decode_tokens": decode_tokens,
                "options": dict(side.options),
            }
            shown = _Staged(where, progress)
            results[side.key].append(measure(job, label=side.label, progress=shown, notice=once))
    settings: dict[str, Any] = {"threads": threads, "decode_tokens": decode_tokens}
    for side in sides:
        settings[side.key] = {"model": side.options["model"], **results[side.key][0]["settings"]}
    return Report(len(ids), runs, {key: Figures.of(found) for key, found in results.items()}, settings)


@dataclass(frozen=True)
class _Staged:
    where: str
    progress: Progress

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        self.progress(f"{self.where}: {stage}", done, total)
