"""The front door: help, version, suggestions, exit codes, and one line for every error."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from satchel import __version__
from satchel.cli import COMMANDS, main
from satchel.errors import ModelError


def python(*arguments: str, folder: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False, **more
    )


def test_help_lists_every_command(satchel: Any) -> None:
    for arguments in ([], ["-h"], ["--help"]):
        result = satchel(*arguments)
        assert result.exit_code == 0
        assert result.stderr == ""
        assert [name for name in COMMANDS if f"\n  {name} " not in result.stdout] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(satchel: Any, name: str) -> None:
    result = satchel(name, "--help", prog_name="satchel")
    assert result.exit_code == 0
    assert f"Usage: satchel {name} " in result.stdout
    assert f"  satchel {name} " in result.stdout.partition("Examples:")[2]


def test_every_command_knows_the_short_help(tmp_path: Path) -> None:
    # In a process of its own: click keeps a command's help option from the first call, which another test may
    # have made outside of the group.
    code = (
        "from satchel.cli import COMMANDS, main\nfor name in COMMANDS:\n"
        "    try: main([name, '-h'], prog_name='satchel')\n"
        "    except SystemExit as end: print('code', end.code)"
    )
    done = python("-c", code, folder=tmp_path)
    assert done.stderr == ""
    assert done.stdout.count("code 0\n") == len(COMMANDS)
    assert [name for name in COMMANDS if f"Usage: satchel {name} " not in done.stdout] == []


def test_version(satchel: Any) -> None:
    assert satchel("--version").stdout == f"satchel {__version__}\n"


def test_python_m_satchel(tmp_path: Path) -> None:
    done = python("-m", "satchel", "--version", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"satchel {__version__}\n", "")


def test_commands_are_loaded_when_they_are_called(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom satchel.cli import main\ntry: main(['{}'], prog_name='satchel')\nexcept SystemExit: pass\n"
        "print([name for name in ('onnxruntime', 'rich', 'satchel.cli.ask') if name in sys.modules])"
    )
    for option in ("--version", "nonsense"):
        done = python("-c", code.format(option), folder=tmp_path)
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["aks"], "unknown command 'aks': did you mean 'ask'?", "satchel"),
        (["modles"], "unknown command 'modles': did you mean 'models'?", "satchel"),
        (["xyzzy"], f"unknown command 'xyzzy': commands are {', '.join(COMMANDS)}", "satchel"),
        (["--bogus"], "No such option", "satchel"),
        (["models", "--bogus"], "No such option", "satchel models"),
        (["models", "extra"], "Got unexpected extra argument", "satchel models"),
    ],
)
def test_usage_errors(satchel: Any, arguments: list[str], message: str, hint: str) -> None:
    result = satchel(*arguments, prog_name="satchel")
    assert result.exit_code == 2
    assert result.stdout == ""
    line, help_line = result.stderr.splitlines()
    assert line.startswith(f"satchel: {message}")
    assert help_line == f"Try '{hint} --help' for help."


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ModelError("the file\nis damaged"), 1, "satchel: the file is damaged"),
        (KeyboardInterrupt(), 130, "satchel: stopped"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, None),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "satchel: No space left on device"),
        (click.ClickException("something"), 1, "satchel: something"),
        (click.Abort(), 130, "satchel: stopped"),
    ],
)
def test_every_end_has_its_exit_code(
    satchel: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str | None
) -> None:
    @click.command("models")
    def failing() -> None:
        raise error

    monkeypatch.setattr(main, "get_command", lambda *_: failing)
    result = satchel("models")
    assert result.exit_code == code
    assert result.stderr.splitlines() == ([] if line is None else [line])


def test_a_bug_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("models")
    def failing() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main, "get_command", lambda *_: failing)
    with pytest.raises(ZeroDivisionError):
        main(["models"], prog_name="satchel")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m satchel models --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() in {"0", "141"}  # 0 when the pipe took all before the reader was gone
