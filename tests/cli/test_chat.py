"""``satchel chat`` with a tiny model: piped questions, and a person at a terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import satchel as library

SHORT = ("--max-new-tokens", "4")
ENDLESS = ("--max-new-tokens", "100000")


def test_piped_questions_are_one_conversation(satchel: Any, tiny: Path, document: Path) -> None:
    result = satchel("chat", document, *SHORT, input="How often?\n\n  And why?  \n")
    assert result.exit_code == 0
    with library.load(tiny, notice=lambda _: None) as model:
        context = model.read(document)
        answers = [context.ask(question, max_new_tokens=4).text for question in ("How often?", "And why?")]
    assert result.stdout == "\n".join(text if text.endswith("\n") else text + "\n" for text in answers)
    assert "> " not in result.stdout + result.stderr


def test_without_a_document(satchel: Any) -> None:
    result = satchel("chat", *SHORT, input="Hello.\n/kv\n")
    assert result.exit_code == 0
    assert result.stdout
    assert "tokens, " in result.stderr


def test_reset_forgets_the_turns_and_keeps_the_document(satchel: Any, document: Path) -> None:
    once = satchel("chat", document, *SHORT, input="How often?\n/kv\n")
    again = satchel("chat", document, *SHORT, input="And why?\n/reset\nHow often?\n/kv\n")
    assert again.stdout.endswith(once.stdout)
    assert again.stderr.splitlines()[-1].split(";")[0] == once.stderr.splitlines()[-1].split(";")[0]
    assert "(the questions and answers are forgotten)" in again.stderr


def test_a_long_conversation_in_little_memory(satchel: Any, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("The filter is cleaned every second week. " * 40, encoding="utf-8")
    questions = "".join(f"Question {number}: how often, and why not more often?\n" for number in range(12))
    result = satchel(
        "chat", long, "--max-new-tokens", 60, "--policy", "snapkv", "--kv", "hot_tokens=640", "--kv", "chunk=64",
        input=questions + "/kv\n/reset\n/kv\nOnce more?\n",
    )  # fmt: skip
    assert result.exit_code == 0
    full, fresh = (line for line in result.stderr.splitlines() if "hot for each head (policy snapkv)" in line
                   and line[0].isdigit() and "memory limit" in line)  # fmt: skip
    assert int(full.split()[0].replace(",", "")) > int(fresh.split()[0].replace(",", ""))
    assert "reading it again" in result.stderr


def test_commands(satchel: Any, document: Path) -> None:
    result = satchel("chat", document, *SHORT, input="/help\n/kv\n/dance\n/quit\nNever asked\n")
    assert (result.exit_code, result.stdout) == (0, "")
    for part in ("/reset  forget", "(policy full)", "/dance is no command", "memory limit "):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-"], 2, "- would take the questions' standard input for a document"),
        (["missing.txt"], 1, "missing.txt: no such file or folder"),
        (["--memory", "tiny"], 2, "Invalid value for '--memory'"),
        (["--memory", "1MB"], 1, "1MB of memory is too little"),
        (["--kv", "a=b"], 2, "kv setting 'a' is not known"),
        (["--fly"], 2, "No such option"),
        (["-m", "no-such-model"], 1, "no model is called"),
    ],
)
def test_bad_input(satchel: Any, arguments: list[str], code: int, message: str) -> None:
    result = satchel("chat", *arguments, input="Hello\n")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(f"satchel: {message}")


def test_a_question_that_does_not_fit_ends_a_script(satchel: Any, document: Path) -> None:
    result = satchel("chat", document, *SHORT, "--policy", "full", input="word " * 4000 + "\nNever asked\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "satchel: the question has" in result.stderr


def test_questions_of_broken_bytes(satchel: Any) -> None:
    assert satchel("chat", *SHORT, input=b"What is \xff?\n").exit_code == 0


def test_a_person_at_a_terminal(terminal: Any, tiny: Path, document: Path) -> None:
    screen = terminal("chat", "-m", tiny, document, *SHORT)
    assert "tokens read in" in screen.wait_for("Ctrl-D leaves.")
    screen.wait_for("> ")
    screen.send("How often?\n")
    assert "was cut at 4 tokens" in screen.wait_for("> ")
    screen.send("/nonsense\n")
    assert "/nonsense is no command" in screen.wait_for("> ")
    screen.send("\x04")
    code, text = screen.leave()
    assert code == 0
    assert "Traceback" not in text


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Any, patient: Path, document: Path) -> None:
    screen = terminal("chat", "-m", patient, document, *ENDLESS)
    screen.wait_for("Ctrl-D leaves.")
    screen.wait_for("> ")
    for _ in range(2):
        screen.send("How often?\n")
        screen.wait_for("How often?\n")
        time.sleep(0.5)
        screen.send("\x03")
        screen.wait_for("(stopped)")
        screen.wait_for("> ")
    screen.send("/kv\n")
    assert "hot for each head" in screen.wait_for("> ")
    time.sleep(1)  # a person's pace: readline is deaf for an instant between its prompt and its waiting for keys
    screen.send("\x03")  # at the prompt
    code, text = screen.leave()
    assert code == 0
    assert "Traceback" not in text


def test_ctrl_c_while_reading_ends_the_program(terminal: Any, patient: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("The filter is cleaned every second week. " * 1000, encoding="utf-8")
    screen = terminal("chat", "-m", patient, long, "--kv", "chunk=1")
    screen.wait_for("reading")
    screen.send("\x03")
    code, text = screen.leave()
    assert code == 130
    assert text.rstrip().endswith("satchel: stopped")
