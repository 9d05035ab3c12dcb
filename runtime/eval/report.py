"""From the records of all sides to figures: scores beside bytes and rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
ENOUGH = 0.5  # a task that the reference does not reach half the points in says little about a cache


@dataclass(frozen=True)
class SideReport:
    """One side. ``tasks``: its figures by task; bytes are means over the samples, at the end of each.

    ``kv_bytes``: hot, warm and digests, so what lies in memory; ``cold_bytes``: on flash; ``full_kv_bytes``: what the
    same tokens would take in a full cache of 16-bit floats.
    """

    identity: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, float | None]]
    overall: Mapping[str, float | None]
    samples: int
    kv_bytes: float
    cold_bytes: float
    full_kv_bytes: float
    read_tokens_per_second: float
    decode_tokens_per_second: float

    @property
    def kv_share(self) -> float:
        """Of a full cache of 16-bit floats, cold pages not counted."""
        return self.kv_bytes / self.full_kv_bytes if self.full_kv_bytes else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            **self.identity, **self.overall, "samples": self.samples,
            "tasks": {name: dict(figures) for name, figures in self.tasks.items()},
            "kv_bytes": round(self.kv_bytes), "cold_bytes": round(self.cold_bytes),
            "full_kv_bytes": round(self.full_kv_bytes), "kv_share": round(self.kv_share, 5),
            "read_tokens_per_second": round(self.read_tokens_per_second, 2),
            "decode_tokens_per_second": round(self.decode_tokens_per_second, 2),
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """All sides by label, the evaluated one first. ``asked``: suite, context, seed, text and the like."""

    asked: Mapping[str, Any]
    sides: Mapping[str, SideReport]
    metrics: tuple[str, ...]
    reused: int

    @property
    def relative(self) -> dict[str, dict[str, Any]]:
        """For each side but the first: the first one's mean score divided by its own, over the tasks that it is good
        at (half the points or more). Empty for suites without scores."""
        found: dict[str, dict[str, Any]] = {}
        ours, *others = self.sides.items()
        for label, side in others:
            good = [name for name, figures in side.tasks.items() if (figures.get("score") or 0) >= ENOUGH]
            theirs = sum(side.tasks[name]["score"] or 0 for name in good)
            if good:
                mine = sum(ours[1].tasks[name]["score"] or 0 for name in good)
                found[label] = {"ratio": mine / theirs, "tasks": good}
        return found

    def to_json(self) -> dict[str, Any]:
        """As ``satchel eval --json``."""
        sides = {label: side.to_json() for label, side in self.sides.items()}
        return {**self.asked, "reused_samples": self.reused, "sides": sides, "relative": self.relative}


def summarize(
    identity: Mapping[str, Any], tasks: Mapping[str, Mapping[str, float | None]], records: Sequence[Record],
    *, kv_bytes_per_token: int,
) -> SideReport:  # fmt: skip
    """Figures of one side. ``tasks``: by task; overall they count alike."""
    names = list(next(iter(tasks.values())))
    overall: dict[str, float | None] = {}
    for name in names:
        values = [figures[name] for figures in tasks.values()]
        known = [value for value in values if value is not None]
        overall[name] = sum(known) / len(values) if len(known) == len(values) else None
    turns = [turn for record in records for turn in record["turns"]]
    decoded = sum(max(turn["new_tokens"] - 1, 0) for turn in turns)
    read_seconds = sum(record["read_seconds"] for record in records)
    decode_seconds = sum(turn["decode_seconds"] for turn in turns)
    kv = [record["kv"] for record in records]
    return SideReport(
        identity=identity,
        tasks=tasks,
        overall=overall,
        samples=len(records),
        kv_bytes=_mean([usage["hot_bytes"] + usage["warm_bytes"] + usage["digest_bytes"] for usage in kv]),
        cold_bytes=_mean([usage["cold_bytes"] for usage in kv]),
        full_kv_bytes=_mean([usage["total_tokens"] * kv_bytes_per_token for usage in kv]),
        read_tokens_per_second=sum(record["document_tokens"] for record in records) / read_seconds
        if read_seconds
        else 0.0,
        decode_tokens_per_second=decoded / decode_seconds if decode_seconds else 0.0,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
