"""The field manual with recall: a text that speaks of the same things everywhere, which planted needles do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import satchel

SAMPLES = Path(__file__).parents[2] / "docs" / "samples"
THE_FULL_CACHE_TOO_IS_WRONG = ("How many pages", "How many bytes", "Which environment variable")


@pytest.mark.real
def test_recall_answers_what_the_full_cache_answers(real_model: Callable[[str], Path]) -> None:
    """20,000 tokens, far more than recall holds at a time; the full cache answers these nine, and so did recall."""
    questions = json.loads((SAMPLES / "questions.json").read_text(encoding="utf-8"))["questions"]
    asked = [each for each in questions if not each["question"].startswith(THE_FULL_CACHE_TOO_IS_WRONG)]
    assert len(asked) == 9
    wrong = []
    with (
        satchel.load(real_model("qwen2.5-coder-0.5b-instruct"), cache=False) as model,
        model.read(SAMPLES / "field-manual.md") as context,
    ):
        assert context.policy == "recall"
        for each in asked:
            with context.fork() as branch:
                answer = branch.ask(each["question"], max_new_tokens=60).text
            if not all(words.lower() in answer.lower() for words in each["answers"]):
                wrong.append((each["question"], answer))
    assert len(wrong) <= 1, wrong
