"""``satchel ask`` with a tiny model: answers, JSON, bad input, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import satchel as library

FIELDS = {
    "question": str, "answer": str, "model": str, "prompt_tokens": int, "new_tokens": int, "reopened": bool,
    "read_seconds": float, "ttft_seconds": float, "decode_tokens_per_second": float, "peak_rss_bytes": int,
    "kv": dict, "policy": str, "finish_reason": str,
}  # fmt: skip
KV_FIELDS = ["hot_bytes", "warm_bytes", "cold_bytes", "digest_bytes", "hot_tokens", "total_tokens",
             "lost_tokens", "flash_bytes_read"]  # fmt: skip


def test_the_answer_alone_goes_to_standard_output(satchel: Any, tiny: Path, document: Path) -> None:
    result = satchel("ask", document, "How often?", "--max-new-tokens", 12, "--seed", 3, "--temperature", 2)
    assert result.exit_code == 0
    with library.load(tiny, notice=lambda _: None) as model:
        context = model.read(document)
        answer = context.ask("How often?", max_new_tokens=12, temperature=2, seed=3)
    assert answer.text
    assert result.stdout == answer.text + ("" if answer.text.endswith("\n") else "\n")
    expected = "(the answer was cut at 12 tokens; --max-new-tokens allows more)\n"
    assert result.stderr == (expected if answer.usage.finish_reason == "length" else "")


def test_json_has_exactly_the_fields_of_the_contract(satchel: Any, tiny: Path, document: Path) -> None:
    questions = ["How often is it cleaned?", "Was wird gereinigt? ä€😀"]
    result = satchel(
        "ask", "--json", "--max-new-tokens", 5, document, *(word for q in questions for word in ("--question", q))
    )
    assert result.exit_code == 0
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["question"] for row in rows] == questions
    for row in rows:
        assert list(row) == list(FIELDS)
        assert {name: type(value) for name, value in row.items()} == FIELDS
        assert list(row["kv"]) == KV_FIELDS
        assert row["model"] == str(tiny)
        assert row["reopened"] is False
        assert row["policy"] == "full"
        assert row["finish_reason"] in {"length", "stop"}
        assert row["new_tokens"] <= 5
        assert 0 < row["kv"]["hot_tokens"] <= row["kv"]["total_tokens"]


def test_several_questions_are_independent(satchel: Any, document: Path) -> None:
    def ask(*questions: str) -> list[dict[str, Any]]:
        asked = [word for question in questions for word in ("-q", question)]
        output = satchel("ask", document, "--json", "--max-new-tokens", 8, *asked).stdout
        return [json.loads(line) for line in output.splitlines()]

    alone, (_, second) = ask("And why?"), ask("How often?", "And why?")
    for name in ("answer", "prompt_tokens", "kv"):
        assert second[name] == alone[0][name]


def test_a_document_that_memory_cannot_keep_is_read_again(satchel: Any, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("The filter is cleaned every second week. " * 40, encoding="utf-8")
    asked = ("-q", "How often? " * 6, "-q", "And why?", "--max-new-tokens", 200)
    pruned = ("--policy", "snapkv", "--kv", "hot_tokens=640", "--kv", "chunk=64")
    result = satchel("ask", "--json", long, *asked, *pruned)
    assert result.exit_code == 0
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert "reading it again" in result.stderr
    assert first["policy"] == "snapkv"
    assert first["kv"]["total_tokens"] > first["kv"]["hot_tokens"]
    alone = json.loads(satchel("ask", "--json", long, *asked[2:], *pruned).stdout)
    assert second["answer"] == alone["answer"]
    piped = satchel("ask", "--json", "-", *asked, *pruned, input=long.read_text(encoding="utf-8"))
    assert [json.loads(line)["answer"] for line in piped.stdout.splitlines()] == [first["answer"], second["answer"]]


def test_standard_input_and_several_documents(satchel: Any, document: Path) -> None:
    result = satchel("ask", document, "-", "Well?", "--max-new-tokens", 3, "--json", input="More of it.\n")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["prompt_tokens"] > 100
    twice = satchel("ask", "-", "-", "Well?", input="x")
    assert (twice.exit_code, twice.stdout) == (1, "")
    assert "more than once" in twice.stderr


USAGE = [
    ([], "no document and no question"),
    (["DOC"], "'DOC' is a document, and no question follows"),
    (["DOC", "DOC"], "'DOC' is a document, and no question follows"),
    (["DOC", "-"], "'-' is a document, and no question follows"),
    (["What?"], "no document"),
    (["-q", "What?"], "no document"),
    (["DOC", ""], "the question is empty"),
    (["DOC", "-q", " \n"], "the question is empty"),
    (["DOC", "What?", "--fly"], "No such option"),
    (["DOC", "What?", "--memory", "banana"], "Invalid value for '--memory': 'banana' is not a size: write it like"),
    (["DOC", "What?", "--memory", "-1GB"], "Invalid value for '--memory': '-1GB' is not a size"),
    (["DOC", "What?", "--policy", "magic"], "policy 'magic' is not known; choose one of auto, full"),
    (["DOC", "What?", "--policy", "full", "--kv", "hot_tokens=999"], "policy full keeps every token"),
    (["DOC", "What?", "--kv", "sinks"], "Invalid value for '--kv': 'sinks' is not KEY=VALUE; known keys are budget"),
    (["DOC", "What?", "--kv", "=3"], "Invalid value for '--kv'"),
    (["DOC", "What?", "--kv", "shoes=2"], "kv setting 'shoes' is not known; known are budget_bytes, chunk"),
    (["DOC", "What?", "--kv", "sinks=many"], "kv sinks='many' is not a number of tokens"),
    (["DOC", "What?", "--kv", "scorer=dice"], "kv scorer='dice' is not known"),
    (["DOC", "What?", "--device", "abacus"], "Invalid value for '--device'"),
    (["DOC", "What?", "--rope", "linear"], "rope 'linear' is not known; give as-trained, yarn, or yarn:FACTOR"),
    (["DOC", "What?", "--threads", "0"], "Invalid value for '--threads'"),
    (["DOC", "What?", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
    (["DOC", "What?", "--temperature", "-1"], "Invalid value for '--temperature'"),
    (["DOC", "What?", "--temperature", "nan"], "temperature is nan"),
    (["DOC", "What?", "--top-p", "0"], "Invalid value for '--top-p'"),
    (["DOC", "What?", "--seed", "x"], "Invalid value for '--seed'"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE)
def test_usage_errors(satchel: Any, document: Path, arguments: list[str], message: str) -> None:
    result = satchel("ask", *(str(document) if word == "DOC" else word for word in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    line, hint = result.stderr.splitlines()
    assert line.startswith(f"satchel: {message.replace('DOC', str(document))}")
    assert hint.endswith("--help' for help.")


FAILURES = [
    (["missing.txt", "What?"], "missing.txt: no such file or folder; check the path"),
    (["EMPTY", "What?"], "is empty (0 bytes)"),
    (["BLANK", "What?"], "has no text, only white space"),
    (["LONG", "What?", "--policy", "full"], "reads at most 4,096 with policy full; use policy auto"),
    (["DOC", "word " * 4000, "--policy", "full"], "the question has 2"),
    (["DOC", "What?", "-m", "no-such-model"], "no model is called 'no-such-model'"),
    (["DOC", "What?", "-m", "no/such.gguf"], "does not exist; give a .gguf file"),
    (["DOC", "What?", "-m", "DOC"], "satchel: "),
    (["DOC", "What?", "--memory", "10MB"], "10MB of memory is too little for"),
    (["DOC", "What?", "--memory", "0"], "0B of memory is too little for"),
]


@pytest.mark.parametrize(("arguments", "message"), FAILURES)
def test_failures_are_one_line(
    satchel: Any, tmp_path: Path, document: Path, arguments: list[str], message: str
) -> None:
    texts = {"EMPTY": "", "BLANK": " \n\n", "LONG": "One more of many sentences. " * 900}
    names = {"DOC": document, **{name: tmp_path / f"{name.lower()}.txt" for name in texts}}
    for name, text in texts.items():
        names[name].write_text(text, encoding="utf-8")
    result = satchel("ask", *(names.get(word, word) for word in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("satchel: ")
    assert message in line


def test_too_little_memory_names_what_would_do(satchel: Any, document: Path) -> None:
    line = satchel("ask", document, "What?", "--memory", "10MB").stderr
    needed = line.partition("with this model: ")[2].partition(" would do")[0]
    assert needed.endswith("MB")
    assert "raise --memory" in line


def test_a_question_of_broken_bytes(satchel: Any, document: Path) -> None:
    result = satchel("ask", "--json", document, "What is \udcff?", "--max-new-tokens", 2)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["question"] == "What is ??"


def ask_slowly(document: Path, patient: Path) -> subprocess.Popen[str]:
    """An answer that is far from its end when Ctrl-C comes."""
    words = ["ask", "-m", str(patient), str(document), "Why?", "--max-new-tokens", "100000"]
    return subprocess.Popen(
        [sys.executable, "-m", "satchel", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace",
        cwd=document.parent,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process there")
def test_ctrl_c_stops_an_answer(document: Path, patient: Path) -> None:
    with ask_slowly(document, patient) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "satchel: stopped\n"


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process there")
def test_ctrl_c_while_standard_input_is_read(document: Path, tiny: Path) -> None:
    words = ["ask", "-m", str(tiny), "-", "Why?"]
    with subprocess.Popen(
        [sys.executable, "-c", READY + "main(sys.argv[1:], prog_name='satchel')", *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=document.parent,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130  # though the pipe stays open and the reader blocked
        assert process.stderr is not None
        assert process.stderr.read() == "satchel: stopped\n"


# Says when the documents are about to be read.
READY = """
import sys
from satchel.cli import main, session
read = session.read_documents
def announce(sources):
    print("reading", flush=True)
    return read(sources)
session.read_documents = announce
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way there")
def test_a_reader_that_leaves_stops_the_answer(document: Path, patient: Path) -> None:
    with ask_slowly(document, patient) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_on_a_terminal_a_bar_is_drawn_and_vanishes(terminal: Any, tiny: Path, document: Path) -> None:
    screen = terminal("ask", "-m", tiny, document, "Why?", "--max-new-tokens", 4)
    code, text = screen.leave()
    assert code == 0
    assert "reading" in text
    assert "ETA" in text
    after_the_bar = text.rpartition("\x1b[2K")[2]
    assert "reading" not in after_the_bar
    assert "the answer was cut at 4 tokens" in after_the_bar


def test_ctrl_c_on_a_terminal_while_reading(terminal: Any, patient: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("The filter is cleaned every second week. " * 1000, encoding="utf-8")
    screen = terminal("ask", "-m", patient, long, "Why?", "--kv", "chunk=1")
    screen.wait_for("reading")
    screen.send("\x03")
    code, text = screen.leave()
    assert code == 130, text
    assert text.rstrip().endswith("satchel: stopped")
    assert "Traceback" not in text
