"""``satchel bench``: how fast and how large we are on this machine, alone or beside llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..devices.sizes import format_size
from ..errors import OptionError
from ..export.hub.registry import DEFAULT_MODEL
from ..runtime.bench import DECODE_TOKENS, DEFAULT_RUNS, RATIOS, Figures, Report, named_file, prepare
from ..runtime.options import Options
from .options import disk_option, engine_option, key_values
from .progress import progress_bar

EPILOG = """\b
Examples:
  satchel bench qwen2.5-coder-0.5b-instruct --context 8192 --against llama.cpp
  satchel bench model.gguf --context 8192 --kv hot_tokens=2048 --against llama.cpp --runs 5 --json
  satchel bench model.gguf --context 8192 --against llama.cpp:model-q4_0.gguf
  satchel bench model.gguf --context 8192 --engine llama.cpp --policy snapkv --kv hot_tokens=2048
"""
ROWS = {
    "prefill_tokens_per_second": ("prefill", "{:,.1f} tokens/s"),
    "decode_tokens_per_second": ("decode", "{:,.1f} tokens/s"),
    "ttft_seconds": ("first token after", "{:,.2f} s"),
    "peak_rss_bytes": ("peak memory", ""),
    "kv_bytes": ("KV cache", ""),
}


def _peer(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        if value is not None:
            named_file(value)
    except OptionError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error
    return value


@click.command("bench", epilog=EPILOG, short_help="Measure speed and memory, also beside llama.cpp.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--context", type=click.IntRange(min=1), required=True, metavar="N", help="Tokens to read.")
@click.option("--against", metavar="llama.cpp[:PATH]", callback=_peer,
              help="Measure llama.cpp, too, on the same .gguf file or on the one at PATH.")
@click.option("--runs", type=click.IntRange(min=1), default=DEFAULT_RUNS, show_default=True, metavar="R",
              help="Measurements of each side; the medians count.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), metavar="FILE",
              help="Read this document, repeated or cut to N tokens (else made-up prose).")
@click.option("--policy", default="auto", show_default=True, metavar="NAME",
              help="full keeps every token, auto what fits and recalls the rest, a scorer's name forgets by it.")
@click.option("--kv", multiple=True, metavar="KEY=VALUE", callback=key_values,
              help="A setting of our cache, repeatable, such as hot_tokens=2048.")
@click.option("--memory", metavar="SIZE",
              help="Limit of our process, such as 1.2GB (else what the machine has).")
@disk_option
@engine_option
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Of both sides (else all cores).")
@click.option("--cache-dir", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where models lie (else $SATCHEL_CACHE_DIR, else the platform's cache folder).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str, context: int, against: str | None, runs: int, text: Path | None, policy: str,
    kv: dict[str, str], memory: str | None, disk: int | None, engine: str, threads: int | None,
    cache_dir: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Read N tokens with MODEL, decode some more, and print rates, time to the first token and memory.

    MODEL is a name from `satchel models`, a .gguf file, or a package or Hugging Face folder. Every measurement
    is a process of its own, and the sides take turns. Both read the same token ids with the same number of threads.
    Absolute figures drift with the machine; ratios of one run hold.
    """
    try:
        Options.check(memory, policy, kv, threads, "cpu", disk, engine)
    except OptionError as error:
        raise click.UsageError(str(error), click.get_current_context()) from error
    with progress_bar("bytes") as progress:
        contest = prepare(
            model, context, against=against, runs=runs, text=text, memory=memory, policy=policy,
            disk=disk, kv=kv, engine=engine, threads=threads, cache_dir=cache_dir, progress=progress,
            notice=progress.notice,
        )  # fmt: skip
    with progress_bar("tokens") as progress:
        report = contest.run(progress=progress, notice=progress.notice)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        labels = {side.key: side.label for side in contest.sides}
        parts = (_head(model, report), _table(report, labels), _foot(report, labels))
        click.echo("\n\n".join("\n".join(part) for part in parts))


def _head(model: str, report: Report) -> list[str]:
    runs = "1 run" if report.runs == 1 else f"median of {report.runs} runs"
    return [
        f"{model}: {report.context:,} tokens read, {DECODE_TOKENS} decoded, "
        f"{report.settings['threads']} threads, {runs}"
    ]


def _table(report: Report, labels: Mapping[str, str]) -> list[str]:
    ratio = {name: f"{report.ratio[short]:.2f}x" for short, name in RATIOS.items() if report.ratio}
    lines = [["", *(labels[key] for key in report.figures), *(["ratio"] if ratio else [])]]
    for name, (label, form) in ROWS.items():
        cells = [_cell(figures, name, form) for figures in report.figures.values()]
        lines.append([label, *cells, *([ratio.get(name, "")] if ratio else [])])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(_aligned(line, widths)).rstrip() for line in lines]


def _cell(figures: Figures, name: str, form: str) -> str:
    value = getattr(figures, name)
    return form.format(value) if form else format_size(value)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    label, *cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    return [label.strip().ljust(widths[0]), *cells]


def _foot(report: Report, labels: Mapping[str, str]) -> list[str]:
    """The settings: figures mean nothing without them."""
    settings = report.settings
    repeats = settings["text_repeats"]
    lines = [f"text: {settings['text']}" + (f", repeated {repeats} times" if repeats > 1 else "")]
    for key in report.figures:
        shown = [f"{name} {_plain(value)}" for name, value in settings[key].items() if value is not None]
        lines.append(f"{labels[key]}: {', '.join(shown)}")
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return str(value)
