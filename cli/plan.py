"""``satchel plan``: what reading a long text would take, in bytes and seconds, without reading it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..devices.planner import Plan
from ..devices.sizes import format_size, parse_tokens
from ..errors import OptionError
from ..export.hub.registry import DEFAULT_MODEL
from ..runtime import load
from ..runtime.options import Options
from ..runtime.predict import Forecast, forecast
from .options import disk_option, key_values, size
from .progress import progress_bar

EPILOG = """\b
Examples:
  satchel plan qwen2.5-coder-0.5b-instruct --memory 1GB --context 128K
  satchel plan model.gguf --memory 700MB --context 32K --disk 0
  satchel plan model.gguf --context 16K --kv budget_bytes=25MB --json | jq .placement
"""
PLACES = {
    "full": "the whole cache in memory",
    "warm": "hot tokens and the whole archive in memory",
    "mixed": "hot tokens and a part of the archive in memory, the rest on disk",
    "cold": "hot tokens in memory, the archive on disk",
    "pruned": "the best tokens in memory, the others forgotten",
    "compiled": "everything in memory while it is read and compiled, then the best tokens",
}


def _tokens(ctx: click.Context, parameter: click.Parameter, text: str) -> int:
    try:
        return parse_tokens(text)
    except OptionError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error


@click.command("plan", epilog=EPILOG, short_help="Show what a long text would take, without reading it.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--context", callback=_tokens, required=True, metavar="N",
              help="Tokens of the text with questions and answers, such as 20000 or 32K (in 1024s).")
@click.option("--memory", metavar="SIZE", callback=size,
              help="Limit of the whole process, such as 1.2GB.  [default: what is free, less a margin]")
@disk_option
@click.option("--policy", default="auto", show_default=True, metavar="NAME",
              help="full keeps every token, auto what fits and recalls the rest, a scorer's name forgets by it.")
@click.option("--kv", multiple=True, metavar="KEY=VALUE", callback=key_values,
              help="A setting of the KV cache, repeatable, such as budget_bytes=25MB.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N",
              help="Threads to compute with.  [default: the cores that this process may use]")
@click.option("--cache-dir", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where models lie (else $SATCHEL_CACHE_DIR, else the platform's cache folder).")
@click.option("--measure/--no-measure", default=None,
              help="Measure this machine anew, or work the seconds out from the model's size if it was never "
                   "measured.  [default: measure it once]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str, context: int, memory: int | None, disk: int | None, policy: str, kv: dict[str, str],
    threads: int | None, cache_dir: Path | None, measure: bool | None, as_json: bool,
) -> None:  # fmt: skip
    """Show how MODEL would read N tokens: bytes of memory and disk row by row, the placement of the KV cache,
    seconds of reading and the rate of answering.

    MODEL is a name from `satchel models`, a .gguf file, or a package or Hugging Face folder; it is fetched and
    exported first where that is needed. The first time, a few seconds go into measuring this machine with the model.
    """
    try:
        Options.check(memory, policy, kv, threads, "cpu", disk)
    except OptionError as error:
        raise click.UsageError(str(error), click.get_current_context()) from error
    with progress_bar("bytes") as progress:
        loaded = load(
            model, memory=memory, disk=disk, policy=policy, kv=kv, threads=threads, cache_dir=cache_dir,
            progress=progress, notice=progress.notice,
        )  # fmt: skip
    with loaded:
        found = forecast(loaded, context, measure=measure)
    if as_json:
        click.echo(json.dumps(describe(model, context, found), indent=2))
    else:
        click.echo("\n".join(_lines(model, context, found)))


def describe(model: str, context: int, found: Forecast) -> dict[str, Any]:
    """A forecast as ``plan --json`` prints it."""
    plan, predicted = found.plan, found.plan.predicted
    assert predicted is not None
    return {
        "model": model, "context": context, "memory_bytes": plan.limit_bytes, "disk_bytes": found.disk_bytes,
        "placement": plan.placement, "why": found.why, "codec": plan.codec, "retriever": plan.retriever,
        "chunk": plan.chunk, "hot_tokens": plan.hot_tokens, "sinks": plan.sinks, "window": plan.window,
        "recall_tokens": plan.recall_tokens,
        "rows": [{"name": name, "bytes": taken} for name, taken in plan.rows],
        "total_bytes": plan.total_bytes, "held_bytes": plan.held_bytes(context),
        "hot_bytes": plan.kv_limit_bytes, "window_bytes": plan.window_bytes, "warm_bytes": plan.warm_bytes,
        "cold_bytes": plan.cold_bytes, "digest_bytes": plan.digest_bytes, "recall_bytes": plan.recall_bytes,
        "full_limit_bytes": plan.full_limit_bytes, "predicted": asdict(predicted), "rates": asdict(found.rates),
    }  # fmt: skip


def _lines(model: str, context: int, found: Forecast) -> list[str]:
    plan = found.plan
    rows = [(name, taken) for name, taken in plan.rows if taken]
    rows.append(("total in memory", plan.total_bytes))
    if plan.cold_bytes:
        rows.append((f"archive on disk ({plan.codec})", plan.cold_bytes))
    width = max(len(name) for name, _ in rows)
    return [
        f"{model}: {context:,} tokens in {format_size(plan.limit_bytes)} of memory and "
        f"{format_size(found.disk_bytes)} of disk",
        "",
        *(f"{name:<{width}}  {format_size(taken):>7}" for name, taken in rows),
        "",
        f"placement   {plan.placement}: {PLACES[plan.placement]}",
        f"settings    {_settings(plan)}",
        f"predicted   {_seconds(found)}",
        "",
        found.why,
    ]


def _settings(plan: Plan) -> str:
    named = {
        "codec": plan.codec, "retriever": plan.retriever, "chunk": plan.chunk, "hot tokens": plan.hot_tokens,
        "sinks": plan.sinks, "window": plan.window, "recalled tokens": plan.recall_tokens or None,
    }  # fmt: skip
    return ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)


def _seconds(found: Forecast) -> str:
    predicted = found.plan.predicted
    assert predicted is not None
    how = "by rates measured here" if found.rates.is_measured else "by arithmetic, not measured"
    return (
        f"{predicted.read_seconds:,.1f} s of reading, then {predicted.decode_tokens_per_second:,.1f} tokens/s "
        f"({how})"
    )
