"""Every task's samples: facts where they should be, counts by the rules, sizes within the context, the same bytes."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import islice, pairwise
from typing import Any

import pytest
from satchel.errors import DocumentError
from satchel.runtime.eval.answering import manual_facts
from satchel.runtime.eval.conversations import (
    MULTITURN_SUITE,
    NEEDLE_SUITE,
    RULER_SUITE,
    even_places,
    spread_places,
)
from satchel.runtime.eval.haystack import NOISE, Haystack, plant
from satchel.runtime.eval.needles import MULTITURN, NEEDLE, RULER_NEEDLES
from satchel.runtime.eval.sizing import Filler, Speaker, largest
from satchel.runtime.eval.task import Place, Sample, score
from satchel.runtime.eval.words import draw_keys, draw_values

TASKS = {task.name: task for suite in (RULER_SUITE, NEEDLE_SUITE, MULTITURN_SUITE) for task in suite.task_objects}
FOUND = {  # needles planted, references asked for, by task
    "single_1": (1, 1), "single_2": (1, 1), "single_3": (1, 1), "multikey_1": (4, 1), "multikey_2": (None, 1),
    "multikey_3": (None, 1), "multivalue": (4, 4), "multiquery": (4, 4), "needle": (1, 1), "multiturn": (8, 1),
}  # fmt: skip
NEEDLE_LINE = re.compile(r"One of the special magic (numbers|uuids) for ([-\w]+) is: ([-\w]+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
CONTEXT = 4000


def make(speaker: Speaker, haystack: Haystack, name: str, *, seed: int = 1, place: Place | None = None) -> Sample:
    return Filler(speaker, haystack, CONTEXT, seed).fill(TASKS[name], place or Place.spread(0))


def test_ruler_has_its_thirteen_tasks() -> None:
    needles = [task.name for task in RULER_NEEDLES]
    assert RULER_SUITE.tasks == (*needles, "vt", "cwe", "fwe", "qa_1", "qa_2")
    assert len(set(RULER_SUITE.tasks)) == 13


@pytest.mark.parametrize("name", TASKS)
def test_every_sample_fills_the_context_and_not_more(speaker: Speaker, haystack: Haystack, name: str) -> None:
    filler = Filler(speaker, haystack, CONTEXT, 1)
    for place in spread_places(3):
        sample = filler.fill(TASKS[name], place)
        assert CONTEXT * 0.8 < speaker.tokens(sample) <= CONTEXT
        whole = speaker.tokenizer.encode(sample.document)
        assert speaker.tokens(sample) > len(whole) + sum(question.max_new_tokens for question in sample.questions)


@pytest.mark.parametrize("name", TASKS)
def test_every_reference_stands_in_the_document(speaker: Speaker, haystack: Haystack, name: str) -> None:
    for place in spread_places(3):
        sample = make(speaker, haystack, name, place=place)
        for question in sample.questions:
            assert question.references
            assert score(sample.document, question.references) == 1
            assert score(question.text, question.references) == 0, "the question gives the answer away"


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides(speaker: Speaker, haystack: Haystack, name: str) -> None:
    first = make(speaker, haystack, name)
    assert make(speaker, haystack, name) == first
    assert make(speaker, haystack, name, seed=2).document != first.document
    assert make(speaker, haystack, name, place=Place.spread(1)).document != first.document


@pytest.mark.parametrize("name", FOUND)
def test_needles_are_counted_and_answered(speaker: Speaker, haystack: Haystack, name: str) -> None:
    sample = make(speaker, haystack, name)
    planted, asked = FOUND[name]
    needles = [(match[2], match[3]) for match in NEEDLE_LINE.finditer(sample.document)]
    assert len(needles) == planted if planted else len(needles) > 20
    assert len(set(needles)) == len(needles)
    assert len({value for _, value in needles}) == len(needles)
    for question in sample.questions:
        assert len(question.references) == asked
        keys = {key for key, value in needles if value in question.references}
        assert all(key in question.text for key in keys)
        assert {value for key, value in needles if key in keys} == set(question.references)
    if name in ("single_3", "multikey_3"):
        assert UUID.fullmatch(sample.questions[0].references[0])
    else:
        assert re.fullmatch(r"\d{7}", sample.questions[0].references[0])
    assert bool(UUID.fullmatch(needles[0][0])) == (name == "multikey_3")
    assert (NOISE in sample.document) == (name == "single_1")


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_the_needle_lies_at_its_depth(speaker: Speaker, haystack: Haystack, depth: float) -> None:
    sample = make(speaker, haystack, "needle", place=Place("x", 0, depth))
    text = sample.document.partition("\n\n")[2]
    match = NEEDLE_LINE.search(text)
    assert match
    longest = max(map(len, haystack.pieces))
    assert abs(match.start() - depth * (len(text) - len(match[0]))) <= longest / 2 + 2


def test_needle_depths_and_their_labels() -> None:
    assert [place.label for place in even_places(5)] == ["10%", "30%", "50%", "70%", "90%"]
    assert [place.depth for place in even_places(5)] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert even_places(3)[0].label == "16.67%"


def test_more_samples_keep_the_first_ones_and_spread() -> None:
    assert spread_places(9)[:4] == spread_places(4)
    depths = sorted(place.depth for place in spread_places(8))
    assert max(b - a for a, b in zip([0, *depths], [*depths, 1], strict=True)) < 0.25


def test_several_needles_are_far_apart(speaker: Speaker, haystack: Haystack) -> None:
    sample = make(speaker, haystack, "multiturn")
    starts = [match.start() / len(sample.document) for match in NEEDLE_LINE.finditer(sample.document)]
    assert len(starts) == 8
    assert min(b - a for a, b in pairwise(starts)) > 0.08


def test_turns_ask_for_every_needle_once_in_another_order(speaker: Speaker, haystack: Haystack) -> None:
    sample = make(speaker, haystack, "multiturn")
    planted = [match[3] for match in NEEDLE_LINE.finditer(sample.document)]
    asked = [question.references[0] for question in sample.questions]
    assert sorted(asked) == sorted(planted)
    assert asked != planted


def test_variables_form_one_chain_in_order(speaker: Speaker, haystack: Haystack) -> None:
    sample = make(speaker, haystack, "vt")
    text = sample.document.partition("The text:\n")[2]
    statements = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
    names = [name for name, _ in statements]
    assert tuple(names) == sample.questions[0].references
    assert [source for _, source in statements][1:] == names[:-1]
    assert statements[0][1] in sample.questions[0].text
    assert all(re.fullmatch("[A-Z]{5}", name) for name in names)
    assert not set(names) & set(re.findall("[A-Z]{5}", sample.document.partition("The text:\n")[0]))


@pytest.mark.parametrize(("context", "often", "seldom"), [(4000, 6, 1), (8000, 30, 3)])
def test_common_words_come_as_often_as_the_rules_say(
    speaker: Speaker, haystack: Haystack, context: int, often: int, seldom: int
) -> None:
    sample = Filler(speaker, haystack, context, 1).fill(TASKS["cwe"], Place.spread(0))
    entries = re.findall(r"(\d+)\. (\w+)", sample.document.partition("\n\n")[2])
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    references = sample.questions[0].references
    assert len(references) == 10
    assert {counts.pop(word) for word in references} == {often}
    assert set(counts.values()) == {seldom}
    assert not [word for word in counts if score(word, references)], "scores look for parts of words"
    assert len({*references} & {*haystack.words}) > 1, "words of the text come first"


def test_frequent_words_follow_zipf(speaker: Speaker, haystack: Haystack) -> None:
    sample = make(speaker, haystack, "fwe")
    counts = Counter(sample.document.partition("\n\n")[2].split())
    (dots, most), *others = counts.most_common()
    assert dots == "..."
    assert tuple(word for word, _ in others[:3]) == sample.questions[0].references
    assert others[2][1] > others[3][1], "the last rank that is asked for is beyond doubt"
    assert [round(most / count) for _, count in others[:3]] == [4, 9, 16]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in others)


def test_the_manuals_questions_have_their_paragraphs() -> None:
    facts = manual_facts()
    assert len(facts) == 12
    assert all(score(fact.paragraph, fact.answers) == 1 for fact in facts)
    assert "Pemberton" in facts[0].paragraph
    assert not facts[0].paragraph.startswith(">")


def test_only_one_paragraph_holds_the_answer(speaker: Speaker, haystack: Haystack) -> None:
    asked = set()
    for place in spread_places(12):
        sample = make(speaker, haystack, "qa_1", place=place)
        question = sample.questions[0]
        holding = [part for part in sample.document.split("\n\n") if score(part, question.references) == 1]
        assert len(holding) == 1
        asked.add(question.text)
    assert len(asked) == 12


def test_two_paragraphs_are_needed(speaker: Speaker, haystack: Haystack) -> None:
    sample = make(speaker, haystack, "qa_2")
    question = sample.questions[0]
    person = re.search(r"^(.+) was born", question.text)
    assert person
    paragraphs = sample.document.split("\n\n")
    birth = [part for part in paragraphs if person[1] in part]
    fame = [part for part in paragraphs if score(part, question.references) == 1]
    assert len(birth) == len(fame) == 1
    assert birth != fame
    (thing,) = question.references
    town = {word for word in re.findall(r"[A-Z]\w+", birth[0]) if word in fame[0]} - {"Paragraph"}
    assert len(town) == 1, "a town links the two"
    assert thing not in birth[0]


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("It is 12345.", ["12345"], 1.0), ("it is ABC", ["abc"], 1.0), ("nothing", ["abc"], 0.0),
        ("one and TWO", ["One", "two", "three", "four"], 0.5), ("", ["x"], 0.0),
    ],
)  # fmt: skip
def test_scores(answer: str, references: list[str], expected: float) -> None:
    assert score(answer, references) == expected


def test_planted_sentences_stand_in_order() -> None:
    text = plant(["a b. ", "c d.\n", "e f. "], [(1.0, "Z."), (0.0, "X."), (0.0, "Y."), (0.7, "W.")])
    assert text == "X. Y. a b. c d.\nW.\ne f. Z."


@pytest.mark.parametrize("text", ["one line without an end " * 200, "x" * 3000, "短い。" * 50, "A. B! C?\n\nD"])
def test_pieces_are_the_text(text: str) -> None:
    pieces = Haystack(text).pieces
    assert "".join(pieces).rstrip() == text.rstrip()
    assert max(map(len, pieces)) <= 402
    assert len(pieces) > 1
    assert Haystack(text).paragraphs


def test_a_text_of_white_space_is_refused() -> None:
    with pytest.raises(DocumentError, match="no words to hide facts in"):
        Haystack(" \n\t ")


def test_the_built_in_text_is_the_same_every_time() -> None:
    assert Haystack.built_in().sha256 == Haystack.built_in().sha256
    assert len(Haystack.built_in().pieces) > 1000


@pytest.mark.parametrize("draw", [draw_keys, draw_values])
@pytest.mark.parametrize("kind", ["words", "uuid"])
def test_nothing_is_drawn_twice(draw: Any, kind: str) -> None:
    drawn = list(islice(draw(random.Random(3), kind), 30_000))
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("limit", [1, 2, 3, 17, 64, 1000])
def test_largest(limit: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest(fits, 1) == limit
    assert len(tried) < 25


def test_the_suites_need_no_more_than_they_have() -> None:
    assert NEEDLE.asked == 1
    assert MULTITURN.turns
