"""``satchel eval``: what a policy costs in answers, beside the full cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..devices.sizes import format_size
from ..errors import OptionError
from ..export.hub.registry import DEFAULT_MODEL
from ..runtime.eval import (
    DEFAULT_SEED,
    Evaluation,
    Order,
    Report,
    SideReport,
    check_plot,
    find_suite,
    name_sides,
    prepare,
    suite_names,
    write_plot,
)
from .interrupts import run
from .leaderboard import LEADERBOARD_OPTIONS, check_use, leaderboard_options, show_leaderboard
from .options import engine_option, key_values
from .progress import progress_bar

EPILOG = """\b
Examples:
  satchel eval qwen2.5-coder-0.5b-instruct --suite needle --context 4096 --policy snapkv
  satchel eval model.gguf --suite ruler --tasks single_2,vt --context 4096 --text manual.pdf --json
  satchel eval model.gguf --suite multiturn --context 8192 --policy recency --against full,llama.cpp:q4_0
  satchel eval model.gguf --suite perplexity --context 8192 --text manual.pdf --plot kl.svg
  satchel eval model.gguf --suite needle --context 4096 --engine llama.cpp --policy keydiff --kv hot_tokens=1024
  satchel eval model.gguf --leaderboard --methods auto,recency,snapkv --budgets 1/8 --table board.md
"""
PIPE_WIDTH = 200  # characters; a table in a file or pipe is not cut to a terminal's width
FORMATS = {"score": "{:.1%}", "kl_nats": "{:.4f}", "perplexity": "{:.3f}", "top1_agreement": "{:.1%}"}
NAMES = {"score": "score", "kl_nats": "KL (nats)", "perplexity": "perplexity", "top1_agreement": "same best token"}


@click.command("eval", epilog=EPILOG, short_help="Measure what a policy costs in answers.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--suite", type=click.Choice(suite_names()),
              help="; ".join(f"{name}: {find_suite(name).about}" for name in suite_names()) + ".")
@click.option("--context", type=click.IntRange(min=1), metavar="N",
              help="Tokens of document, questions and answers together.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N",
              help="Documents of each task (needle: depths, perplexity: positions in a window).  "
                   "[default: 5; perplexity 64]")
@click.option("--windows", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Windows of the text that suite perplexity reads.")
@click.option("--tasks", metavar="A,B", help="Only these tasks of the suite.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), multiple=True, metavar="FILE",
              help="The text that facts are hidden in, repeatable (else made-up prose).")
@click.option("--policy", default="auto", show_default=True, metavar="NAME",
              help="What is evaluated: full keeps every token, auto what fits and recalls the rest, a scorer's name "
                   "forgets by it.")
@click.option("--kv", multiple=True, metavar="KEY=VALUE", callback=key_values,
              help="A setting of our cache, repeatable, such as hot_tokens=512.")
@click.option("--memory", metavar="SIZE", help="Limit of our process, such as 1.2GB (else what the machine has).")
@engine_option
@click.option("--against", multiple=True, default=("full",), show_default=True, metavar="SIDE",
              help="Whom to compare with, repeatable: full, another policy with the same settings, "
                   "llama.cpp:f16|q8_0|q4_0 (its KV type), or none.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png|.svg",
              help="Draw scores over bytes of keys and values.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Keep finished samples in FOLDER/eval (else in the cache folder).")
@click.option("--fresh", is_flag=True, help="Measure the policy's samples anew, whatever was done before.")
@click.option("--seed", type=click.IntRange(min=0), default=DEFAULT_SEED, show_default=True, metavar="N",
              help="Of facts, depths and places in the text.")
@leaderboard_options
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Of all sides (else all cores).")
@click.option("--cache-dir", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where models lie (else $SATCHEL_CACHE_DIR, else the platform's cache folder).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (its keys: docs/evaluation.md).")
@click.pass_context
def command(
    ctx: click.Context, /, model: str, suite: str | None, context: int | None, samples: int | None, windows: int,
    tasks: str | None, text: tuple[Path, ...], seed: int, plot: Path | None, as_json: bool, **sides: Any,
) -> None:  # fmt: skip
    """Ask MODEL about documents that are made up on the spot, with a policy and with the full cache beside it.

    A document is read before its question is known. Scores are the mean share of the expected words that stand in
    the answers; perplexity says how far the next-token distribution is from the full cache's. Finished samples are
    kept: the same command goes on where it was stopped, and the full cache's samples serve all policies.
    """
    check_use(ctx)
    names = tuple(name.strip() for name in tasks.split(",")) if tasks is not None else ()
    if sides["leaderboard"]:
        given = {"context": context, "samples": samples, "tasks": names}
        order = {"seed": seed, "text": text, **{name: value for name, value in given.items() if value}}
        show_leaderboard(ctx, model, order, {**sides, "plot": plot, "as_json": as_json})
        return
    assert suite is not None, "by check_use"
    assert context is not None, "by check_use"
    _evaluate(model, Order(suite, context, samples, windows, names, seed, text), plot, sides, as_json=as_json)


def _evaluate(model: str, order: Order, plot: Path | None, sides: dict[str, Any], *, as_json: bool) -> None:
    sides = {name: value for name, value in sides.items() if name not in LEADERBOARD_OPTIONS}
    try:
        order.check()
        for side in name_sides(
            sides["policy"], sides["kv"], sides["memory"], sides["against"], sides["engine"]
        ):
            side.check(sides["threads"])
        if plot is not None:
            check_plot(plot)
    except OptionError as error:
        raise click.UsageError(str(error), click.get_current_context()) from error
    with progress_bar("bytes") as progress:
        evaluation = prepare(model, order, progress=progress, notice=progress.notice, **sides)
    report = _measure(evaluation)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        _show(report)
    if plot is not None:
        write_plot(report, plot)


def _measure(evaluation: Evaluation) -> Report:
    with progress_bar("tokens", one_bar=True) as progress:
        try:
            return run(
                lambda: evaluation.run(progress=progress, notice=progress.notice), evaluation.cancel
            )
        except KeyboardInterrupt:
            progress.close()
            progress.notice(f"{evaluation.finished()} finished samples are kept; the same command goes on from there")
            raise


def _show(report: Report) -> None:
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    asked = report.asked
    first = next(iter(report.sides.values()))
    console.print(f"{asked['model']}: {asked['suite']} at {asked['context']:,} tokens, {first.samples} samples",
                  highlight=False, markup=False)  # fmt: skip
    console.print(_table(report))
    for label, found in report.relative.items():
        console.print(f"{found['ratio']:.1%} of {label} over the tasks on which that reaches half the points or more "
                      f"({len(found['tasks'])} of {len(first.tasks)})", highlight=False, markup=False)  # fmt: skip


def _table(report: Report) -> Table:
    """A column for each side; tasks, then what they took."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for label in report.sides:
        table.add_column(label, justify="right", no_wrap=True)
    sides = list(report.sides.values())
    several = len(sides[0].tasks) > 1
    for metric in report.metrics:
        if several:
            for task in sides[0].tasks:
                table.add_row(task, *(_figure(metric, side.tasks[task][metric]) for side in sides))
        table.add_row(f"mean {NAMES[metric]}" if several else NAMES[metric],
                      *(_figure(metric, side.overall[metric]) for side in sides))  # fmt: skip
    table.add_row("KV in memory", *(_held(side) for side in sides))
    if any(side.cold_bytes for side in sides):
        table.add_row("KV on flash", *(format_size(round(side.cold_bytes)) for side in sides))
    table.add_row("read", *(_rate(side.read_tokens_per_second) for side in sides))
    table.add_row("decode", *(_rate(side.decode_tokens_per_second) for side in sides))
    return table


def _figure(metric: str, value: float | None) -> str:
    return "-" if value is None else FORMATS[metric].format(value)


def _held(side: SideReport) -> str:
    return f"{format_size(round(side.kv_bytes))} ({side.kv_share:.1%})"


def _rate(value: float) -> str:
    return f"{value:,.1f} tokens/s" if value else "-"
