"""``satchel methods``: what can be chosen by name, and the papers behind it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Protocol

import click
from rich.console import Console
from rich.table import Table

from ..cache.codecs import codec_names, find_codec
from ..cache.head_budgets import ADAPTIVE, AdaptiveBudgets
from ..cache.head_profiles import find_profile, profile_names
from ..cache.lowrank import find_lowrank, lowrank_names
from ..cache.mergers import find_merger, merger_names
from ..cache.retrievers import find_retriever, retriever_names
from ..cache.scorers import find_scorer, scorer_names

EPILOG = """\b
Examples:
  satchel methods
  satchel methods --json
"""
PIPE_WIDTH = 240  # characters; a table in a file or pipe is not cut to a terminal's width


class Method(Protocol):
    """What every registered method says of itself."""

    @property
    def name(self) -> str: ...

    @property
    def paper(self) -> str: ...


# kind -> (names, the method of a name, how it is chosen): a new registry is a row here
REGISTRIES: dict[str, tuple[Callable[[], Iterable[str]], Callable[[str], Method], str]] = {
    "scorer": (scorer_names, find_scorer, "--policy {name}, which forgets, or beside recall --kv scorer={name}"),
    "head budgets": (
        lambda: (ADAPTIVE,), lambda _: AdaptiveBudgets(), "--kv head_budgets={name}, with a scorer's --policy",
    ),
    "head profile": (profile_names, find_profile, "--kv heads={name}"),
    "merger": (merger_names, find_merger, "--kv merge={name}, with a scorer's --policy"),
    "codec": (codec_names, find_codec, "--kv codec={name}"),
    "low rank": (lowrank_names, find_lowrank, "--kv lowrank={name}, with --kv rank=PERCENT"),
    "retriever": (retriever_names, find_retriever, "--kv retriever={name}"),
}  # fmt: skip


@click.command("methods", epilog=EPILOG, short_help="List the methods that have a name, with their papers.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object per method.")
def command(as_json: bool) -> None:
    """List every method of the KV cache that can be chosen by name, the paper it is from, and how to choose it."""
    rows = describe()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("KIND", "NAME", "PAPER", "CHOSEN BY"):
        table.add_column(column, no_wrap=column in ("KIND", "NAME"))
    for row in rows:
        table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table, highlight=False)


def describe() -> list[dict[str, str]]:
    """One method a row, as ``methods --json`` prints it."""
    return [
        {"kind": kind, "name": name, "paper": find(name).paper, "chosen_by": how.format(name=name)}
        for kind, (names, find, how) in REGISTRIES.items()
        for name in names()
    ]
