"""A picture of a report: score (or divergence) over the bytes of keys and values held in memory, a point a side."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ...errors import OptionError, StorageError
from .report import Report

FORMATS = (".png", ".svg")
TITLES = {"score": "score", "kl_nats": "mean KL to the full cache (nats)", "perplexity": "perplexity"}


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises OptionError for another format, or when matplotlib is missing."""
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"--plot {path} has to end in {' or '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError('--plot needs matplotlib, which is not installed; pip install "satchel[eval]"')
    if not path.absolute().parent.is_dir():
        raise OptionError(f"--plot {path}: the folder {path.parent} does not exist; make it first")


def write_plot(report: Report, path: Path) -> None:
    """Writes the picture. Raises StorageError when the file cannot be written."""
    from matplotlib.figure import Figure  # of an extra; without pyplot, which would look for a display

    metric = next((name for name in report.metrics if _known(report, name)), report.metrics[0])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, side in report.sides.items():
        value = side.overall[metric]
        if value is not None:
            axes.plot(side.kv_bytes / 1e6, value, "o", label=label)
            axes.annotate(label, (side.kv_bytes / 1e6, value), xytext=(6, 6), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("KV cache in memory (MB)")
    axes.set_ylabel(TITLES[metric])
    if metric == "score":
        axes.set_ylim(-0.05, 1.1)
    axes.margins(x=0.25)
    axes.grid(visible=True, alpha=0.3)
    asked = report.asked
    axes.set_title(f"{asked['model']}: {asked['suite']} at {asked['context']:,} tokens", fontsize=10)
    try:
        figure.savefig(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}); name another file by --plot") from None


def _known(report: Report, metric: str) -> bool:
    """Whether some side has it. A side that is its own reference has no divergence: then it is left out."""
    return any(side.overall[metric] is not None for side in report.sides.values())
