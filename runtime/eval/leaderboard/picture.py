"""A leaderboard as a picture: score, and divergence from the full cache, over the bytes of keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....errors import StorageError
from .board import KL
from .document import Row, budgets_of, ranked

NAMED = 4  # methods that recall, and so many that forget, of each budget have a colour and are named, and these
ALWAYS_NAMED = ("auto", "recency", "snapkv", "full")
COLORS = "tab20"  # of matplotlib
OTHERS = "0.8"  # grey
SMALL = 7  # points
MARKERS = "circle: recalls, cross: forgets"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG or SVG, by its suffix: a line for each method, a point on it for each budget. Raises StorageError
    when the file cannot be written."""
    import matplotlib  # of an extra; without pyplot, which would look for a display
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    budgets = [*budgets_of(document), None]
    named = _named(document, budgets)
    palette: Any = matplotlib.colormaps[COLORS]
    methods = dict.fromkeys(row["method"] for budget in budgets for row in ranked(document, budget))
    for method in sorted(methods, key=lambda name: named.get(name, -1)):  # the grey ones below
        rows = [row for budget in budgets for row in ranked(document, budget) if row["method"] == method]
        place, whole = named.get(method), rows[0]["budget"] is None
        look = {
            "marker": "s" if whole else "o" if _recalls(rows[0]) else "x", "markersize": 5,
            "linestyle": "-" if _recalls(rows[0]) else ":",
            "color": OTHERS if place is None else palette.colors[place % palette.N],
            "label": None if place is None else method,
        }  # fmt: skip
        _line(left, rows, [row["score"] for row in rows], look)
        _line(right, rows, [_divergence(row) for row in rows], {**look, "label": None})
    for axes, title in ((left, "score, of the full cache's"), (right, "mean KL to the full cache (nats)")):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("KV cache in memory (MB)")
        axes.set_ylabel(title)
        axes.grid(visible=True, alpha=0.3)
    left.set_ylim(-0.05, 1.1)
    right.set_yscale("symlog", linthresh=1e-3)
    right.set_ylim(bottom=0)
    if left.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=SMALL, title=MARKERS, title_fontsize=SMALL)
    figure.suptitle(f"{Path(document['model']).name}, {document['context']:,} tokens, {document['date']}", fontsize=10)
    try:
        figure.savefig(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}); name another file by --plot") from None


def _named(document: Mapping[str, Any], budgets: Sequence[str | None]) -> dict[str, int]:
    """The methods with a name in the picture, and the place of each in the legend."""
    found = dict[str, None]()
    for budget in budgets:
        rows = ranked(document, budget)
        best = [row for kind in (True, False) for row in [row for row in rows if _recalls(row) == kind][:NAMED]]
        found |= dict.fromkeys(row["method"] for row in best)
        found |= dict.fromkeys(row["method"] for row in rows if row["method"] in ALWAYS_NAMED)
    return {method: place for place, method in enumerate(found)}


def _recalls(row: Row) -> bool:
    return bool(row["settings"].get("policy") == "auto")


def _line(axes: Any, rows: Sequence[Row], values: Sequence[float | None], look: Mapping[str, Any]) -> None:
    known = [(row["kv_bytes"] / 1e6, value) for row, value in zip(rows, values, strict=True) if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), **look)


def _divergence(row: Row) -> float | None:
    found: float | None = row["suites"][KL]["summary"]["kl_nats"]
    return found
