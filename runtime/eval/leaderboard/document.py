"""What a leaderboard has found, as one JSON object (``leaderboard.json``): table and picture are made of nothing else.

Its keys are in docs/evaluation.md. `ranked` says who is better, once for the table, the picture and whoever reads it.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from ....devices.machine import cpu_name, memory_total
from ....devices.sizes import format_size
from ..report import Report, SideReport, summarize
from ..run import Evaluation
from ..sides import FULL
from .board import KL, Board, Entry

FORMAT = 1
Row = Mapping[str, Any]


def header(board: Board) -> dict[str, Any]:
    """What is compared, and on what."""
    order, ground = board.order, board.ground
    spec = ground.package.spec
    return {
        "format": FORMAT, "model": ground.model, "context": order.context, "samples": order.samples,
        "seed": order.seed, "text": [str(path) for path in order.text] or None,
        "suites": {name: sorted({item.task for item in found.items}) for name, found in board.evaluations.items()},
        "package": {"spec": spec.to_json(), "weight_bytes": ground.package.weight_bytes},
        "kv_bytes_per_token": spec.kv_bytes_per_token,
    }  # fmt: skip


def describe(board: Board, *, command: str = "", date: datetime.date | None = None) -> dict[str, Any]:
    """The whole object, of what is measured so far and of what the board has kept."""
    full = next(entry for entry in board.entries if entry.side.label == FULL)
    stamp = {
        "date": str(date or datetime.datetime.now(datetime.timezone.utc).date()),
        "machine": f"{cpu_name()}, {format_size(memory_total())} of memory, {_threads(board.ground.threads)}",
    }  # fmt: skip
    budgets = [
        {"share": str(budget.share), "tokens": budget.tokens, "kv_bytes": budget.kv_bytes}
        for budget in {entry.budget: None for entry in board.entries if entry.budget}
    ]
    rows: dict[tuple[str, str | None], Row] = {
        entry.key: stamp | _row(board, entry, full) for entry in board.entries if not entry.lacks
    }
    rows |= {key: row for key, row in board.kept.items() if key not in rows or not is_measured(rows[key])}
    return {
        **header(board), **stamp, "command": command,
        "budgets": [*budgets, *(budget for budget in board.kept_budgets if budget not in budgets)],
        "rows": list(rows.values()),
        "left_out": {
            entry.method.name: entry.lacks for entry in board.entries if entry.lacks and entry.key not in board.kept
        },
    }  # fmt: skip


def budgets_of(document: Mapping[str, Any]) -> list[str]:
    """The budgets' shares, the largest first."""
    found = [budget["share"] for budget in sorted(document["budgets"], key=lambda each: -each["kv_bytes"])]
    return [str(share) for share in found]


def ranked(document: Mapping[str, Any], budget: str | None) -> list[Row]:
    """The measured rows of a budget (None: those that have none), the best first: by score, then by divergence, then
    by bytes."""
    rows = [row for row in document["rows"] if row["budget"] == budget and is_measured(row)]
    return sorted(rows, key=lambda row: (-(row["score"] or 0), _divergence(row), row["kv_bytes"]))


def winners(document: Mapping[str, Any], budget: str) -> list[str]:
    """The methods that no other one of that budget has beaten in score. Better than the full cache is chance: no method
    knows more than it, so that a score above 1 counts as 1."""
    rows = ranked(document, budget)
    best = min(rows[0]["score"], 1.0) if rows else 0.0
    return [row["method"] for row in rows if row["score"] >= best]


def is_measured(row: Row) -> bool:
    """Whether all its cells are."""
    return all("summary" in cell for cell in row["suites"].values())


def _divergence(row: Row) -> float:
    found = row["suites"][KL]["summary"]["kl_nats"]
    return 0.0 if found is None else float(found)  # who is the reference has none


def _row(board: Board, entry: Entry, full: Entry) -> dict[str, Any]:
    cells = {name: _cell(board, name, found, entry, full) for name, found in board.evaluations.items()}
    talked = [name for name in cells if name != KL]
    relative = [cells[name].get("relative") for name in talked]
    known = [value for value in relative if value is not None]
    row: dict[str, Any] = {
        "method": entry.key[0], "budget": entry.key[1],
        "settings": dict(entry.side.identity), "suites": cells,
        "score": sum(known) / len(known) if known and all("summary" in cells[name] for name in talked) else None,
    }  # fmt: skip
    records = _records([board.evaluations[name] for name in talked], entry)
    plans = [record["plan"] for record in records if record.get("plan")]
    row["plan"] = plans[0] if plans else {}
    if records:
        per_token = board.ground.package.spec.kv_bytes_per_token
        row |= _figures(summarize({}, {"": {}}, records, kv_bytes_per_token=per_token))
    return row


def _cell(board: Board, name: str, evaluation: Evaluation, entry: Entry, full: Entry) -> dict[str, Any]:
    """``summary`` when it is measured, ``refused`` when it cannot be, neither when it is still to be done."""
    refused = board.refusals.get((entry.side.label, name))
    if refused is not None:
        return {"refused": refused}
    if evaluation.missing(entry.side):
        return {}
    side = evaluation.summary(entry.side)
    cell: dict[str, Any] = {
        "summary": dict(side.overall), "samples": side.samples,
        "tasks": {task: dict(figures) for task, figures in side.tasks.items()},
    }  # fmt: skip
    if name != KL and not evaluation.missing(full.side):
        beside = Report({}, {"": side, FULL: evaluation.summary(full.side)}, evaluation.suite.metrics, 0)
        cell["relative"] = beside.relative.get(FULL, {}).get("ratio")
    return cell


def _figures(side: SideReport) -> dict[str, float]:
    """Means over the conversations."""
    return {
        "kv_bytes": round(side.kv_bytes), "kv_share": round(side.kv_share, 5), "cold_bytes": round(side.cold_bytes),
        "read_tokens_per_second": round(side.read_tokens_per_second, 2),
        "decode_tokens_per_second": round(side.decode_tokens_per_second, 2),
    }  # fmt: skip


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _records(evaluations: Sequence[Evaluation], entry: Entry) -> list[dict[str, Any]]:
    return [
        record for evaluation in evaluations for found in evaluation.records(entry.side).values() for record in found
    ]
