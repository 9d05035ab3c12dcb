"""``satchel eval --leaderboard``: its options, and what becomes of what it finds: a table, its JSON and a picture."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..devices.reporting import Notice
from ..errors import OptionError, StorageError
from ..runtime.eval import check_plot
from ..runtime.eval.leaderboard import (
    DEFAULT_BUDGETS,
    DEFAULT_CONTEXT,
    RULER_TASKS,
    Board,
    BoardOrder,
    adopt,
    describe,
    draw,
    parse_budgets,
    prepare_board,
    read_earlier,
    to_markdown,
)
from ..runtime.options import Options
from .interrupts import run
from .progress import ProgressBar, progress_bar

DEFAULT_TABLE = Path("leaderboard.md")
LEADERBOARD_OPTIONS = ("leaderboard", "methods", "budgets", "table")
NOT_OF_RESULTS = ("as_json", "fresh")  # said once, not part of what the table says
NOT_OWN = ("suite", "windows", "policy", "kv", "engine", "against")  # which it decides itself


def leaderboard_options(command: Any) -> Any:
    """Adds the options that only ``--leaderboard`` has."""
    shares = ",".join(str(share) for share in DEFAULT_BUDGETS)
    for option in reversed((
        click.option("--leaderboard", is_flag=True,
                     help=f"Run every method that 'satchel methods' lists at every budget on all suites, at "
                          f"{DEFAULT_CONTEXT:,} tokens unless --context says else, and write a table.  --tasks: of "
                          f"ruler  [default there: {','.join(RULER_TASKS)}]"),
        click.option("--methods", metavar="NAME,...",
                     help="Of the leaderboard: only these rows, such as auto,snapkv,auto+codec=q4."),
        click.option("--budgets", default=shares, show_default=True, metavar="SHARE,...",
                     help="Of the leaderboard: shares of the full cache's bytes, in the order to measure them."),
        click.option("--table", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_TABLE,
                     show_default=True, metavar="FILE.md",
                     help="Of the leaderboard: where the table goes; its figures as .json and, with matplotlib, a "
                          "picture as .svg beside it."),
    )):  # fmt: skip
        command = option(command)
    return command


def check_use(ctx: click.Context) -> None:
    """Raises click.UsageError for options that have no meaning with, or without, ``--leaderboard``."""
    given = {name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    with_it = ctx.params["leaderboard"]
    for name in NOT_OWN if with_it else LEADERBOARD_OPTIONS:
        if name in given:
            how = "decides that itself: leave out" if with_it else "is left out, which is needed for"
            raise click.UsageError(f"--leaderboard {how} --{name}", ctx)
    for name in () if with_it else ("suite", "context"):
        if ctx.params[name] is None:
            raise click.MissingParameter(ctx=ctx, param=next(each for each in ctx.command.params if each.name == name))


def show_leaderboard(ctx: click.Context, model: str, order: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Measures, and writes the table. ``order``: what `BoardOrder` calls so too; ``given``: the other options."""
    table: Path = given["table"]
    picture = given["plot"] or _default_picture(table)
    try:
        asked = BoardOrder(
            **order, budgets=parse_budgets(given["budgets"]), methods=_names(given["methods"])
        )
        asked.check()
        Options.check(given["memory"], "auto", None, given["threads"], "cpu")
        if table.suffix != ".md":
            raise OptionError(f"--table {table} has to end in .md")
        if not table.absolute().parent.is_dir():
            raise OptionError(f"--table {table}: the folder {table.parent} does not exist; make it first")
        if given["plot"] is not None:
            check_plot(given["plot"])
    except OptionError as error:
        raise click.UsageError(str(error), ctx) from error
    settings = {name: given[name] for name in ("memory", "threads", "out", "cache_dir")}
    with progress_bar("bytes") as progress:
        board = prepare_board(model, asked, progress=progress, notice=progress.notice, **settings)
    if given["fresh"]:
        board.forget()
    _adopt(board, table, progress.notice, again=given["fresh"])
    pages = _Pages(board, table, picture, _command_line(ctx))
    _measure(board, pages)
    if given["as_json"]:
        click.echo(json.dumps(pages.document, indent=2))
    else:
        click.echo(table.read_text(encoding="utf-8"))


def _adopt(board: Board, table: Path, notice: Notice, *, again: bool) -> None:
    """Rows of the table that is there already stay in it."""
    file = table.with_suffix(".json")
    earlier = read_earlier(file)
    if earlier is None:
        return
    why = adopt(board, earlier, again=again)
    if why:
        notice(f"{file} is of {why} and will be replaced")
    elif board.kept:
        notice(f"{len(board.kept)} rows of {file} stay as they are (--fresh measures those that you name again)")


class _Pages:
    """The files that are written again and again while a leaderboard grows."""

    def __init__(self, board: Board, table: Path, picture: Path | None, command: str) -> None:
        self._board, self._table, self._picture, self._command = board, table, picture, command
        self.document: dict[str, Any] = {}

    def write(self, *, last: bool = False) -> None:
        """The table and its JSON; the picture only at the ``last`` time. Raises StorageError."""
        self.document = describe(self._board, command=self._command)
        if last and self._picture is not None:
            draw(self.document, self._picture)
        shown = self._picture
        beside = None if shown is None else _seen_from(self._table, shown)
        _write(self._table.with_suffix(".json"), json.dumps(self.document, indent=1, ensure_ascii=False) + "\n")
        _write(self._table, to_markdown(self.document, picture=beside))

    @property
    def files(self) -> str:
        """For a person: what was written."""
        names = [self._table, self._table.with_suffix(".json"), self._picture]
        return ", ".join(str(name) for name in names if name is not None)


def _measure(board: Board, pages: _Pages) -> None:
    with progress_bar("tokens", one_bar=True) as progress:
        progress.notice(f"samples are kept in {board.ground.folder}")
        meter = _Clock(progress)
        try:
            run(lambda: board.run(progress=meter, notice=progress.notice, keep=pages.write), board.cancel)
        except KeyboardInterrupt:
            progress.close()
            progress.notice(f"{board.finished()} finished samples are kept; the same command goes on from there")
            raise
        finally:
            progress.close()
            pages.write(last=True)
            progress.notice(f"written: {pages.files}")


class _Clock:
    """Passes progress on to the bar, and says in a line how long it will take whenever another model is loaded: for
    those who watch a log."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar, self._stage = bar, ""
        self._begun: tuple[float, int] | None = None

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        now = time.monotonic()
        if self._begun is None:
            self._begun = now, done
        if stage != self._stage:
            self._stage = stage
            seconds, tokens = now - self._begun[0], done - self._begun[1]
            left = f"; about {_hours((total - done) * seconds / tokens)} to go" if tokens else ""
            self._bar.notice(f"{stage}{left}")
        self._bar(stage, done, total)


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(minutes, 1)} min"


def _names(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(name.strip() for name in text.split(","))


def _default_picture(table: Path) -> Path | None:
    return None if importlib.util.find_spec("matplotlib") is None else table.with_suffix(".svg")


def _seen_from(table: Path, picture: Path) -> str:
    """How the page refers to the picture."""
    same = table.absolute().parent == picture.absolute().parent
    return picture.name if same else str(picture.absolute())


def _write(path: Path, text: str) -> None:
    """Beside its place, then renamed: a reader never sees half a table."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}); name another file by --table") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _command_line(ctx: click.Context) -> str:
    """What was typed, in the order in which options are listed: to be read in the table and typed again."""
    words = ["satchel", str(ctx.info_name)]
    for parameter in ctx.command.params:
        value = ctx.params.get(str(parameter.name))
        if ctx.get_parameter_source(str(parameter.name)) != ParameterSource.COMMANDLINE:
            continue
        if parameter.name in NOT_OF_RESULTS:
            continue
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif value is True:
            words.append(parameter.opts[0])
        else:
            for each in value if isinstance(value, tuple) else (value,):
                words += [parameter.opts[0], str(each)]
    return shlex.join(words)
