"""``satchel cache``: what was read before and is kept, so that it need not be read again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..cache.snapshots import Entry, Snapshot, SnapshotStore
from ..devices.files.cache_folder import cache_folder, snapshots_folder
from ..devices.sizes import format_size
from ..errors import SnapshotError

EPILOG = """\b
Examples:
  satchel cache list
  satchel cache verify
  satchel cache rm report.pdf
  satchel cache rm 3fa1c0de
  satchel cache clear --yes
"""
PIPE_WIDTH = 200  # characters; a table in a file or pipe is not cut to a terminal's width

_folder_option = click.option(
    "--cache-dir", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Look into this folder (else $SATCHEL_CACHE_DIR, else the platform's cache folder).",
)  # fmt: skip


@click.group("cache", epilog=EPILOG, short_help="List, check or remove what was read before.",
             invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """List, check or remove snapshots: the caches of documents that were read before.

    A document that has one opens at once instead of being read again. Removing a snapshot never loses anything
    but that time.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _subcommand(name: str, help_text: str, examples: str) -> Callable[[Callable[..., None]], click.Command]:
    def register(function: Callable[..., None]) -> click.Command:
        lines = "".join(f"  satchel cache {example}\n" for example in examples.split("; "))
        made: click.Command = command.command(name, short_help=help_text, epilog=f"\b\nExamples:\n{lines}")(
            _folder_option(function)
        )
        return made

    return register


@_subcommand("list", "Show the snapshots.", "list; list --json; list --cache-dir /mnt/big/satchel")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object per snapshot.")
def list_command(cache_dir: Path | None, as_json: bool) -> None:
    """Show the snapshots, the last used first: id, size, tokens, model, last use, documents."""
    entries = _store(cache_dir).list()
    if as_json:
        click.echo(json.dumps([describe(entry) for entry in entries], indent=2))
    elif not entries:
        click.echo("no snapshots", err=True)
    else:
        console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
        console.print(_table(entries))


@_subcommand("verify", "Read the snapshots and check every byte.", "verify; verify report.pdf")
@click.argument("what", nargs=-1, metavar="[DOCUMENT|ID]...")
def verify_command(cache_dir: Path | None, what: tuple[str, ...]) -> None:
    """Read the snapshots (all, or those named) and check every byte of them.

    Prints one line for each. Ends with exit code 1 when one cannot be used.
    """
    store = _store(cache_dir)
    problems = 0
    entries = _chosen(store, what) if what else store.list()
    if not entries:
        click.echo("no snapshots", err=True)
    for entry in entries:
        problem = entry.problem or _problem(entry)
        problems += bool(problem)
        click.echo(f"{entry.id}  {problem or 'ok'}")
    if problems:
        click.echo(f"satchel: {_count(problems)} cannot be used; remove with 'satchel cache rm ID'",
                   err=True)
        raise click.exceptions.Exit(1)


@_subcommand("rm", "Remove snapshots.", "rm report.pdf; rm 3fa1c0de 77aa; rm /docs/report.pdf")
@click.argument("what", nargs=-1, required=True, metavar="DOCUMENT|ID...")
def remove_command(cache_dir: Path | None, what: tuple[str, ...]) -> None:
    """Remove the snapshots of a document (by its name, or its path as it was given), or one by its id.

    Four or more digits of an id will do. What another process is using stays.
    """
    store = _store(cache_dir)
    for entry in _chosen(store, what):  # all are known before the first is removed
        store.remove(entry.path)
        click.echo(f"removed {entry.id} ({format_size(entry.file_bytes)})", err=True)


@_subcommand("clear", "Remove all snapshots.", "clear; clear --yes")
@click.option("--yes", is_flag=True, help="Do not ask first.")
def clear_command(cache_dir: Path | None, yes: bool) -> None:
    """Remove all snapshots. Models and exported packages stay."""
    store = _store(cache_dir)
    entries = store.list()
    if entries and not yes:
        size = format_size(sum(entry.file_bytes for entry in entries))
        if not click.confirm(f"Remove {_count(len(entries))} ({size}) in {store.folder}?", err=True):
            return
    removed, left = store.clear()
    click.echo(f"removed {_count(removed)}{f', left {left} in use' if left else ''}", err=True)


def describe(entry: Entry) -> dict[str, object]:
    """One snapshot as ``cache list --json`` prints it; times are in UTC."""
    return {
        "id": entry.id, "path": str(entry.path), "bytes": entry.file_bytes, "tokens": entry.tokens,
        "model": entry.model_name, "model_fingerprint": entry.model_fingerprint,
        "settings": dict(entry.settings), "documents": list(entry.documents),
        "document_count": entry.document_count, "created": _utc(entry.created), "last_used": _utc(entry.last_used),
        "satchel_version": entry.satchel_version, "problem": entry.problem or None,
    }  # fmt: skip


def _store(cache_dir: Path | None) -> SnapshotStore:
    return SnapshotStore(snapshots_folder(cache_folder(cache_dir)), notice=lambda text: click.echo(text, err=True))


def _chosen(store: SnapshotStore, what: tuple[str, ...]) -> list[Entry]:
    return list({entry.path: entry for name in what for entry in store.select(name)}.values())


def _problem(entry: Entry) -> str:
    try:
        with Snapshot.open(entry.path) as snapshot:
            snapshot.verify()
    except SnapshotError as error:
        return str(error)
    return ""


def _table(entries: list[Entry]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("ID", no_wrap=True)
    table.add_column("SIZE", justify="right", no_wrap=True)
    table.add_column("TOKENS", justify="right", no_wrap=True)
    table.add_column("MODEL")
    table.add_column("LAST USE", no_wrap=True)
    table.add_column("DOCUMENTS", overflow="fold")
    for entry in entries:
        used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        # as Text: a name in square brackets is no markup
        table.add_row(entry.id, format_size(entry.file_bytes), "?" if entry.problem else f"{entry.tokens:,}",
                      Text(entry.model_name or "?"), used, Text("cannot be used" if entry.problem else _names(entry)))
    return table


def _count(number: int) -> str:
    return f"{number:,} snapshot{'' if number == 1 else 's'}"


def _names(entry: Entry) -> str:
    shown = [Path(document).name or document for document in entry.documents[:3]]
    more = entry.document_count - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "") or "-"


def _utc(seconds: float) -> str | None:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds") if seconds else None
    except (OverflowError, ValueError, OSError):  # a time that no calendar has
        return None
