"""``satchel models``: the registry, and what of it is on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..devices.files.cache_folder import cache_folder, exported_packages
from ..devices.sizes import format_size
from ..errors import ModelError
from ..export.calibration.files import find_records
from ..export.hub.download import is_verified, model_path
from ..export.hub.registry import DEFAULT_MODEL, ModelEntry, all_models
from ..export.package import open_package

EPILOG = """\b
Examples:
  satchel models
  satchel models --json
  satchel models --verbose
  satchel models --cache-dir /mnt/big/satchel
"""
SHOWN_FIGURES = ("r2", "tokens", "window_tokens", "target", "seed", "seconds")  # of a calibration
PIPE_WIDTH = 200  # characters; a table in a file or pipe is not cut to a terminal's width


@click.command("models", epilog=EPILOG, short_help="List the models that have a name.")
@click.option("--cache-dir", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Look into this folder (else $SATCHEL_CACHE_DIR, else the platform's cache folder).")
@click.option("--verbose", is_flag=True, help="Say what packages there are, and what each is calibrated for.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object per model.")
def command(cache_dir: Path | None, verbose: bool, as_json: bool) -> None:
    """List the models of the registry: size, licence, context, and whether they are on this machine.

    Any .gguf file of a supported architecture works as a model, too: give its path instead of a name.
    """
    root = cache_folder(cache_dir)
    rows = [describe(entry, root) for entry in all_models()]
    if verbose:
        for row in rows:
            row["packages"] = [describe_package(folder) for folder in exported_packages(root, str(row["name"]))]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
        console.print(_table(rows))
        for line in _package_lines(rows) if verbose else ():
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe(entry: ModelEntry, root: Path) -> dict[str, object]:
    """One model as ``models --json`` prints it; ``path`` is null as long as it is not downloaded."""
    path = model_path(entry, root)
    downloaded = is_verified(entry, path)
    return {
        "name": entry.name, "default": entry.name == DEFAULT_MODEL, "supported": entry.supported,
        "architecture": entry.architecture, "kind": entry.kind, "context_tokens": entry.context_tokens,
        "quantization": entry.quantization, "bytes": entry.bytes, "licence": entry.licence,
        "source": f"https://huggingface.co/{entry.hub.repo}", "downloaded": downloaded,
        "exported": bool(exported_packages(root, entry.name)), "path": str(path) if downloaded else None,
        "note": entry.note,
    }


def describe_package(folder: Path) -> dict[str, Any]:
    """A package as ``models --verbose --json`` prints it; ``problem`` says why it, or a calibration, is of no use."""
    found: dict[str, Any] = {"folder": str(folder), "problem": None, "calibrations": {}}
    try:
        records = find_records(open_package(folder))
    except ModelError as error:
        return found | {"problem": str(error)}
    for method, record in records.items():
        found["calibrations"][method] = {**record.figures, "shipped": record.is_shipped, "problem": record.problem}
    return found


def _package_lines(rows: list[dict[str, object]]) -> Iterator[str]:
    for row in rows:
        packages: Any = row["packages"]
        if row["downloaded"] and not packages:
            yield f"\n{row['name']} has no package yet; it is exported on first use"
        for package in packages:
            yield f"\n{row['name']} in {package['folder']}"
            if package["problem"] is not None:
                yield f"  {package['problem']}"
            elif not package["calibrations"]:
                yield "  not calibrated"
            for method, record in package["calibrations"].items():
                figures = ", ".join(f"{key} {record[key]}" for key in SHOWN_FIGURES if key in record)
                yield f"  {method}{' (shipped)' if record['shipped'] else ''}: {record['problem'] or figures}"


def _table(rows: list[dict[str, object]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("NAME", no_wrap=True)
    table.add_column("SIZE", justify="right", no_wrap=True)
    table.add_column("LICENCE")
    table.add_column("CONTEXT", justify="right")
    table.add_column("KIND")
    table.add_column("HERE")
    for row in rows:
        table.add_row(f"{row['name']} (default)" if row["default"] else str(row["name"]),
                      format_size(int(str(row["bytes"]))), str(row["licence"]), f"{row['context_tokens']:,}",
                      str(row["kind"]), _state(row))
    return table


def _state(row: dict[str, object]) -> str:
    if not row["supported"]:
        return f"not supported yet ({row['architecture']})"
    return ", ".join(word for word in ("downloaded", "exported") if row[word]) or "-"
