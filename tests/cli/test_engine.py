"""``--engine llama.cpp`` through the commands, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra llama-cpp")
ENGINE = ("--engine", "llama.cpp")
LONG = "The filter is cleaned once in a week, by the person who was there on the 1st. " * 20


@pytest.fixture
def long_document(tmp_path: Path) -> Path:
    path = tmp_path / "long.txt"
    path.write_text(LONG)
    return path


def test_ask_reads_saves_and_opens_again(satchel: Any, long_document: Path) -> None:
    command = ("ask", long_document, "How often?", *ENGINE, "--json", "--max-new-tokens", 5, "--threads", 1)
    first, second = (json.loads(satchel(*command).stdout) for _ in range(2))
    assert (first["reopened"], second["reopened"]) == (False, True)
    assert first["policy"] == "full"
    assert first["kv"] == second["kv"]
    assert first["kv"]["hot_tokens"] == first["kv"]["total_tokens"] > 500
    rows = json.loads(satchel("cache", "list", "--json").stdout)
    rows = rows if isinstance(rows, list) else rows["snapshots"]
    assert any(long_document.name in str(row) for row in rows)
    assert satchel("cache", "verify", long_document.name).exit_code == 0
    assert satchel("cache", "rm", long_document.name).exit_code == 0
    assert json.loads(satchel(*command).stdout)["reopened"] is False


def test_chat_and_several_questions(satchel: Any, long_document: Path) -> None:
    typed = "How often?\nWho?\n/kv\n/reset\nWho?\n"
    result = satchel("chat", long_document, *ENGINE, "--max-new-tokens", 3, input=typed)
    assert result.exit_code == 0, result.output
    result = satchel("ask", long_document, "-q", "Who?", "-q", "When?", *ENGINE, "--json", "--max-new-tokens", 3)
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize("policy", ["recency", "snapkv"])
def test_a_policy_that_forgets(satchel: Any, long_document: Path, policy: str) -> None:
    kv = [word for pair in ("hot_tokens=300", "window=64", "sinks=4", "chunk=64") for word in ("--kv", pair)]
    result = satchel("ask", long_document, "Who?", *ENGINE, "--policy", policy, *kv, "--json", "--max-new-tokens", 3)
    row = json.loads(result.stdout)
    assert row["policy"] == policy
    assert 300 <= row["kv"]["hot_tokens"] < 400 < row["kv"]["total_tokens"]


def test_what_the_engine_has_no_use_for_is_a_usage_error(satchel: Any, long_document: Path) -> None:
    for wrong, message in (
        (("--kv", "codec=q8"), "kv codec is not for --engine llama.cpp"),
        (("--disk", "1GB"), "--disk is not for --engine llama.cpp"),
        (("--policy", "expected-attention"), "expected-attention is not available with --engine llama.cpp"),
        (("--kv", "storage=bf16"), "kv storage='bf16' is not supported; choose one of f16, q8_0, q4_0"),
    ):
        result = satchel("ask", long_document, "Who?", *ENGINE, *wrong)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    result = satchel("ask", long_document, "Who?", *ENGINE, "--memory", "20MB")
    assert result.exit_code == 1
    assert "would do; raise --memory" in result.stderr


def test_bench_measures_it(satchel: Any, tiny: Path) -> None:
    result = satchel("bench", tiny, "--context", 300, *ENGINE, "--runs", 1, "--json", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["settings"]["satchel"]["engine"] == "llama.cpp"
    assert report["settings"]["satchel"]["storage"] == "f16"


def test_eval_measures_it_beside_its_own_full_cache(satchel: Any, tiny: Path) -> None:
    kv = [word for pair in ("hot_tokens=200", "window=64", "sinks=4", "chunk=64") for word in ("--kv", pair)]
    suite = ("--suite", "perplexity", "--context", 500, "--samples", 8)
    result = satchel("eval", tiny, *suite, *ENGINE, "--policy", "recency", *kv, "--json", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    sides = json.loads(result.stdout)["sides"]
    assert set(sides) == {"recency", "full"}
    assert sides["recency"]["kl_nats"] > 0
