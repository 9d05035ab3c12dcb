"""The command line. Each command is a file of this folder with an object ``command``, loaded when called.

This is the one place where an error becomes a line on standard error and an exit code: 0 done, 1 an error, 2
usage, 130 stopped by Ctrl-C, 141 whoever read our output has left (as shells say of a program that SIGPIPE
killed).
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import SatchelError
from .interrupts import work_is_left

# in the order of the help
COMMANDS = ("ask", "chat", "models", "pull", "export", "calibrate", "plan", "bench", "eval", "cache", "methods")
FAILED, USAGE, STOPPED, PIPE_CLOSED = 1, 2, 130, 141

EPILOG = """\b
Examples:
  satchel ask report.pdf "What was decided about the budget?"
  satchel chat manual.txt
  satchel COMMAND --help
"""


class _StoppedError(Exception):
    """Ctrl-C, in a form that click passes on."""


class _PipeClosedError(Exception):
    """Nobody reads our output any more."""


class _Commands(click.Group):
    """Loads commands lazily and turns whatever ends a command into its exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{cmd_name}", __name__).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            advice = f"did you mean '{close[0]}'?" if close else f"commands are {', '.join(COMMANDS)}"
            raise click.UsageError(f"unknown command {args[0]!r}: {advice}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that has left can still be answered for
            return result
        except KeyboardInterrupt as error:
            raise _StoppedError from error
        except BrokenPipeError as error:
            raise _PipeClosedError from error

    def main(self, *args: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False  # every end has its exit code here, whoever calls
        _survive_odd_characters()
        try:
            result = super().main(*args, **extra)
        except (_StoppedError, click.Abort, KeyboardInterrupt):
            _leave(STOPPED, "stopped")
        except _PipeClosedError:
            _discard_output()
            _leave(PIPE_CLOSED)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "satchel"
            _leave(USAGE, error.format_message(), f"Try '{path} --help' for help.")
        except click.ClickException as error:
            _leave(error.exit_code, error.format_message())
        except SatchelError as error:
            _leave(FAILED, str(error))
        except OSError as error:  # what no floor below took for its own: standard output on a full disk
            _discard_output()
            where = f"{error.filename}: " if error.filename else ""
            _leave(FAILED, f"{where}{error.strerror or error}")
        _leave(result if isinstance(result, int) else 0)


def _survive_odd_characters() -> None:
    """What a terminal's encoding cannot show becomes a question mark, not a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(errors="replace")


def _discard_output() -> None:
    """Drops what is still buffered for standard output, or Python would fail on it once more at its exit."""
    try:
        target = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: a test's buffer
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, target)
    os.close(nowhere)


def _leave(code: int, message: str = "", hint: str = "") -> NoReturn:
    """Exits. A thread that could not be stopped in time is not waited for, and its objects are left alone."""
    try:
        if message:
            click.echo(f"satchel: {' '.join(message.split())}", err=True)
        if hint:
            click.echo(hint, err=True)
        if work_is_left():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    except OSError:  # standard error is gone, too
        os._exit(code)
    sys.exit(code)


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="satchel", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Ask questions about documents longer than your machine could hold, inside one memory limit.

    Everything runs on this machine; the network is used only to fetch a model. Standard output carries
    results, everything else goes to standard error.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
