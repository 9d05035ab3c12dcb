"""``satchel bench``: bad flags, and what it prints for planted figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from satchel.cli.bench import command
from satchel.errors import ModelError
from satchel.runtime.bench import Contest, Figures, Report
from satchel.runtime.bench.compare import Side
from satchel.runtime.bench.text import Text

REPORT = Report(
    1024,
    3,
    {
        "satchel": Figures(250.04, 40.0, 4.25, 620_339_200, 7_188_480),
        "llama_cpp": Figures(100.0, 20.0, 9.5, 700_000_000, 14_376_960),
    },
    {
        "text": "policy.txt", "text_repeats": 2, "threads": 2, "decode_tokens": 32,
        "satchel": {"model": "tiny", "policy": "full", "hot_tokens": None, "chunk": 512},
        "llama_cpp": {"model": "tiny.gguf", "version": "llama-cpp-python 9", "n_batch": 512, "simd": ["AVX", "FMA"]},
    },
)  # fmt: skip


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The command measures nothing and reports `REPORT`; the dictionary gets what it asked for."""
    asked: dict[str, Any] = {}
    sides = (Side("satchel", "satchel", "", {}), Side("llama_cpp", "llama.cpp", "", {}))

    def prepare(model: str, context: int, **given: Any) -> Contest:
        asked.update(given, model=model, context=context)
        return Contest(sides, Text([1], "policy.txt", 2), 3, 2, ())

    def run(self: Contest, **given: Any) -> Report:
        del self, given
        return REPORT

    monkeypatch.setattr("satchel.cli.bench.prepare", prepare)
    monkeypatch.setattr(Contest, "run", run)
    return asked


def test_table_and_settings(planted: dict[str, Any]) -> None:
    flags = ["--against", "llama.cpp:x.gguf", "--kv", "hot_tokens=2048", "--kv", "chunk=64"]
    result = CliRunner().invoke(command, ["tiny", "--context", "1024", *flags], catch_exceptions=False)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "tiny: 1,024 tokens read, 32 decoded, 2 threads, median of 3 runs",
        "",
        "                          satchel       llama.cpp  ratio",
        "prefill            250.0 tokens/s  100.0 tokens/s  2.50x",
        "decode              40.0 tokens/s   20.0 tokens/s  2.00x",
        "first token after          4.25 s          9.50 s",
        "peak memory                 620MB           700MB  0.89x",
        "KV cache                   7.19MB          14.4MB  0.50x",
        "",
        "text: policy.txt, repeated 2 times",
        "satchel: model tiny, policy full, chunk 512",
        "llama.cpp: model tiny.gguf, version llama-cpp-python 9, n_batch 512, simd AVX+FMA",
    ]
    assert planted["kv"] == {"hot_tokens": "2048", "chunk": "64"}
    assert (planted["against"], planted["runs"], planted["context"]) == ("llama.cpp:x.gguf", 3, 1024)


@pytest.mark.usefixtures("planted")
def test_json_alone_on_standard_output() -> None:
    result = CliRunner().invoke(command, ["--context", "1024", "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found == REPORT.to_json()
    assert list(found) == ["context", "runs", "satchel", "llama_cpp", "ratio", "settings"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Missing option '--context'"),
        (["--context", "0"], "0 is not in the range"),
        (["--context", "many"], "'many' is not a valid integer"),
        (["--context", "9", "--runs", "0"], "0 is not in the range"),
        (["--context", "9", "--threads", "0"], "0 is not in the range"),
        (["--context", "9", "--against", "ollama"], "cannot compare with 'ollama'; known are llama.cpp"),
        (["--context", "9", "--kv", "hot_tokens"], "'hot_tokens' is not KEY=VALUE"),
        (["--context", "9", "--kv", "heat=3"], "kv setting 'heat' is not known; known are budget_bytes, chunk"),
        (["--context", "9", "--policy", "best"], "policy 'best' is not known; choose one of auto, full"),
        (["--context", "9", "--memory", "lots"], "'lots' is not a size"),
        (["--context", "9", "--text", "no/such/file"], "'no/such/file' does not exist"),
        (["--context", "9", "--fast"], "No such option"),
    ],
)
def test_bad_flags_are_usage_errors(flags: list[str], message: str) -> None:
    result = CliRunner().invoke(command, ["tiny.gguf", *flags])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_missing_model_is_our_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path / "none.gguf"), "--context", "9"])
    assert isinstance(result.exception, ModelError)
    assert "none.gguf does not exist" in str(result.exception)
    assert result.stdout == ""


def test_help_has_examples() -> None:
    result = CliRunner().invoke(command, ["--help"])
    assert "Examples:\n" in result.output
    assert "  satchel bench model.gguf " in result.output
    assert "--against llama.cpp[:PATH]" in result.output
