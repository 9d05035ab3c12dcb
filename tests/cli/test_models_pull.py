"""``satchel models`` and ``satchel pull``: results on standard output, everything else on standard error."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from satchel.cli.models import command as models
from satchel.cli.progress import ProgressBar, progress_bar
from satchel.cli.pull import command as pull
from satchel.errors import DownloadError, ModelError
from satchel.export.hub import DEFAULT_MODEL, ModelEntry
from satchel.export.hub.registry import HubFile

CONTENT = b"GGUF tiny"
ENTRY = ModelEntry(name=DEFAULT_MODEL, architecture="llama", supported=True, kind="instruct",
                   context_tokens=128, quantization="Q4_0", bytes=len(CONTENT),
                   sha256=hashlib.sha256(CONTENT).hexdigest(), licence="Apache-2.0",
                   hub=HubFile("some/repo", None), index=(), note="For tests.")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Path]:
    """A registry with one tiny model that no source has; calling the fixture puts the file there."""
    monkeypatch.setattr("satchel.export.hub.registry.all_models", lambda: (ENTRY,))
    monkeypatch.setattr("satchel.cli.models.all_models", lambda: (ENTRY,))
    monkeypatch.setenv("SATCHEL_CACHE_DIR", str(tmp_path))

    def put() -> Path:
        path = tmp_path / "models" / f"{ENTRY.name}.gguf"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(CONTENT)
        return path

    return put


def test_models_table_names_everything() -> None:
    result = CliRunner().invoke(models, ["--cache-dir", "/nonexistent"], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "LICENCE", "CONTEXT", "KIND", "HERE"]
    assert lines[1].split() == [DEFAULT_MODEL, "(default)", "491MB", "Apache-2.0", "32,768", "instruct", "-"]
    assert lines[3].split()[0] == "gemma-3-270m"


def test_models_table_says_what_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    strange = replace(ENTRY, supported=False, architecture="mamba")
    monkeypatch.setattr("satchel.cli.models.all_models", lambda: (strange,))
    result = CliRunner().invoke(models, ["--cache-dir", "/nonexistent"], catch_exceptions=False)
    assert "not supported yet (mamba)" in result.stdout


def test_models_json(tiny: Callable[[], Path]) -> None:
    def row() -> dict[str, object]:
        rows: list[dict[str, object]] = json.loads(CliRunner().invoke(models, ["--json"]).stdout)
        return rows[0]

    assert row()["downloaded"] is False
    assert row()["path"] is None
    path = tiny()
    CliRunner().invoke(pull, [])
    package = path.parent.parent / "packages" / f"{ENTRY.name}-0123abcd"
    package.mkdir(parents=True)
    (package / "satchel.json").touch()
    assert row() == {
        "name": DEFAULT_MODEL, "default": True, "supported": True, "architecture": "llama",
        "kind": "instruct", "context_tokens": 128, "quantization": "Q4_0", "bytes": len(CONTENT),
        "licence": "Apache-2.0", "source": "https://huggingface.co/some/repo", "downloaded": True,
        "exported": True, "path": str(path), "note": "For tests."}


def test_pull_prints_the_path_alone(tiny: Callable[[], Path]) -> None:
    path = tiny()
    for options in ([], ["--verify"]):
        result = CliRunner().invoke(pull, [ENTRY.name, *options], catch_exceptions=False)
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"{path}\n", "")


def test_pull_errors_are_satchel_errors(tiny: Callable[[], Path]) -> None:
    assert isinstance(CliRunner().invoke(pull, ["gpt-17"]).exception, ModelError)
    error = CliRunner().invoke(pull, []).exception
    assert isinstance(error, DownloadError)
    assert "\n" not in str(error)
    assert "the registry names no GGUF file in some/repo" in str(error)
    damaged = tiny()
    damaged.write_bytes(b"GGUF tinz")
    result = CliRunner().invoke(pull, [])
    assert isinstance(result.exception, DownloadError)
    assert "is damaged" in result.stderr
    assert result.stdout == ""


def test_help_has_examples() -> None:
    for command in (models, pull):
        result = CliRunner().invoke(command, ["--help"])
        assert "Examples:\n" in result.output
        assert f"  satchel {command.name} " in result.output
        assert "--cache-dir FOLDER" in result.output


def test_bar_shows_amount_rate_and_time_to_go_and_vanishes() -> None:
    screen = io.StringIO()
    bar = ProgressBar("tokens", Console(file=screen, force_terminal=True, width=120, color_system=None))
    bar("reading", 500, 110_000)
    bar("reading", 1500, 110_000)
    time.sleep(0.3)  # the screen is drawn ten times a second
    bar.notice("[a notice] of 3 lines")
    bar("answering", 0, 10)
    bar.close()
    text = screen.getvalue()
    assert "1,500/110,000 tokens" in text
    assert "ETA" in text
    assert "[a notice] of 3 lines" in text
    assert "answering" in text
    assert text.endswith("\x1b[2K")  # the line is erased


def test_without_a_terminal_only_notices_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("bytes") as progress:
        progress("downloading", 1, 2)
        progress.notice("waiting")
    assert capsys.readouterr() == ("", "waiting\n")
