"""A leaderboard as Markdown, made of its JSON object alone: the same object, the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....devices.sizes import format_size
from ...model import ANSWER_ROOM
from .board import KL
from .document import Row, budgets_of, is_measured, ranked
from .methods import SINKS, WINDOW_SHARE

TITLES = {"needle": "needle", "ruler": "RULER", "multiturn": "multi-turn"}
LEGEND = """\
A row is a method, named by its settings: a policy, then `+key=value` (`satchel methods` has the papers). Under `auto`
what leaves the hot tier is kept on flash and recalled; under a scorer's name it is forgotten. Without recall a method
keeps {tokens} of a text between two chunks, with {sinks} sinks and a window of {window} of that, all
alike. With recall `budget_bytes` bounds hot pages, digests and recalled tokens, of a plan that makes room for {room}
tokens of questions and answers as well, and the planner does the rest (column *plan*).

A suite's column has the share of the full cache's score, over the tasks on which that reaches half the points, and in
brackets the score itself. *Score* is the mean of these shares: rows are sorted by it, then by KL. KV in memory is a
mean at the end of the conversations, in bytes and as a share of what the same tokens take in f16. {samples} of each
task: small differences say nothing. Rates are what they were meanwhile: compare them only if nothing else ran on the
machine."""


def to_markdown(document: Mapping[str, Any], *, picture: str | None = None) -> str:
    """The whole page; ``picture``: the file to show in it."""
    tokens = " or ".join(f"{budget['tokens']:,} tokens ({budget['share']})" for budget in document["budgets"])
    samples = "One document" if document["samples"] == 1 else f"{document['samples']} documents"
    legend = LEGEND.format(tokens=tokens, samples=samples, sinks=SINKS, window=WINDOW_SHARE, room=f"{ANSWER_ROOM:,}")
    parts = ["# Leaderboard", _facts(document)]
    if picture is not None:
        parts.append(f"![Score and divergence over the bytes of keys and values]({picture})")
    parts.append(legend)
    for budget in budgets_of(document):
        parts += [f"## {budget} of the full cache", _table(document, budget), *_lists(document, budget)]
    parts += ["## Whole caches", _table(document, None), *_lists(document, None)]
    if document["left_out"]:
        lines = (f"- `{name}`: {why}" for name, why in document["left_out"].items())
        parts += ["## Left out", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(document: Mapping[str, Any]) -> str:
    suites = ", ".join(
        f"{TITLES[name]} ({', '.join(tasks)})" if len(tasks) > 1 else TITLES[name]
        for name, tasks in document["suites"].items() if name != KL
    )  # fmt: skip
    facts = {
        "model": document["model"], "context": f"{document['context']:,} tokens",
        "suites": f"{suites}, and KL to the full cache", "samples": f"{document['samples']} of each task",
        "seed": document["seed"], "text": ", ".join(document["text"] or ["made-up prose"]),
        "machine": "; ".join(_stamps(document, "machine")), "date": ", ".join(_stamps(document, "date")),
        "command": f"`{document['command']}`",
    }  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())])


def _stamps(document: Mapping[str, Any], name: str) -> list[str]:
    """Of the rows, each once: not all need be of the run that wrote the table."""
    return sorted({row.get(name, document[name]) for row in document["rows"]})


def _table(document: Mapping[str, Any], budget: str | None) -> str:
    rows = ranked(document, budget)
    if not rows:
        return "Nothing is measured yet."
    columns = ["method", "score", *TITLES.values(), "KL (nats)", "same best token", "KV in memory", "KV on flash",
               "read, tokens/s", "decode, tokens/s", "plan"]  # fmt: skip
    lines = [_line(columns), _line(["---"] * len(columns)), *(_line(_cells(row)) for row in rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    shares = [_share(row["suites"][name]) for name in TITLES]
    divergence = row["suites"][KL]["summary"]
    kl_nats = divergence["kl_nats"] and max(divergence["kl_nats"], 0.0)  # of rounded rows it can be just below
    return [
        f"`{row['method']}`", _percent(row["score"]), *shares, _number(kl_nats, "{:.4f}"),
        _percent(divergence["top1_agreement"]), f"{format_size(row['kv_bytes'])} ({row['kv_share']:.1%})",
        format_size(row["cold_bytes"]) if row["cold_bytes"] else "–",
        f"{row['read_tokens_per_second']:,.0f}", f"{row['decode_tokens_per_second']:,.1f}", _plan(row["plan"]),
    ]  # fmt: skip


def _share(cell: Mapping[str, Any]) -> str:
    absolute = f"({cell['summary']['score']:.2f})"
    return absolute if cell["relative"] is None else f"{cell['relative']:.0%} {absolute}"


def _plan(plan: Mapping[str, Any]) -> str:
    if plan.get("hot_tokens") is None:
        return "all tokens" if plan else "–"
    found = [f"{plan['hot_tokens']:,} hot", f"chunk {plan['chunk']}", f"window {plan['window']}"]
    if "codec" in plan:
        found += [plan["codec"], f"{plan['retriever']}, {plan['recall_tokens']:,} recalled", plan["placement"]]
    return ", ".join(found)


def _percent(value: float | None) -> str:
    return _number(value, "{:.1%}")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _lists(document: Mapping[str, Any], budget: str | None) -> list[str]:
    """Methods that could not be measured at this budget, and those still to be."""
    rows = [row for row in document["rows"] if row["budget"] == budget and not is_measured(row)]
    refused, waiting = list[str](), list[str]()
    for row in rows:
        reasons = [cell["refused"] for cell in row["suites"].values() if "refused" in cell]
        if reasons:
            refused.append(f"- `{row['method']}`: {reasons[0]}")
        else:
            waiting.append(f"`{row['method']}`")
    found = ["Not possible at this budget:", "\n".join(refused)] if refused else []
    return [*found, f"Not measured yet: {', '.join(waiting)}."] if waiting else found
