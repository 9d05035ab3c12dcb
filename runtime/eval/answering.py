"""Question answering among paragraphs that do not help: what stands in for RULER's ``qa_1`` and ``qa_2``.

RULER takes both from data sets that cannot be shipped (SQuAD and HotpotQA). ``qa_1`` asks the questions of
docs/samples/questions.json: the paragraph of the field manual with the answer is hidden among paragraphs of the given
text and three other paragraphs of the manual. ``qa_2`` needs two paragraphs, as HotpotQA does, but both are made up:
one says in which town a person was born, the other what that town is known for, and three more such pairs are there to
be confused with. So scores of these two cannot be compared with RULER's own.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import StorageError
from .haystack import around
from .task import Draw, Question, Sample, Task
from .words import NOUNS, draw_pseudo_words

SAMPLES = Path(__file__).parents[2] / "docs" / "samples"
NEW_TOKENS = 32
NEAR = 3  # paragraphs that could be mistaken for the right one
HEAD = "Below are numbered paragraphs. Remember what they say: a question about one of them follows.\n\n"
_SECTION = re.compile(r"^## ", re.MULTILINE)
_BIRTHS = (
    "{person} was born in {town}, the second of five children, and left school at the age of fourteen.",
    "In the register of {town} stands the birth of {person}, written in green ink by a tired clerk.",
    "{person}, whose cradle stood in {town}, travelled for most of a long life and wrote few letters.",
    "A plaque on the market square of {town} marks the house where {person} was born.",
)
_FAMES = (
    "Travellers know {town} for its {thing}, which is shown to visitors on the first Sunday of each month.",
    "The town of {town} is known for its {thing}; nothing else there is mentioned in the guide books.",
    "What {town} is known for is its {thing}, rebuilt twice after fires and once after a flood.",
    "Known for its {thing} throughout the region, {town} lies where two rivers meet.",
)


class Fact(NamedTuple):
    """A question of the sample document, and the paragraph that answers it."""

    question: str
    answers: tuple[str, ...]
    paragraph: str


class OneParagraph(Task):
    """One paragraph holds the answer. Sizes count paragraphs of the given text."""

    name = "qa_1"

    def make(self, draw: Draw, size: int) -> Sample:
        facts = manual_facts()
        order = list(range(len(facts)))
        fact = facts[(draw.place.index * 5 + 3) % len(order)]  # 5 and 12 have no common divisor: all come, spread
        others = [other.paragraph for other in facts if not _gives_away(other.paragraph, fact.answers)]
        near = draw.rng.sample(sorted(set(others)), NEAR)
        filling = _strangers(draw, size, fact.answers)
        for paragraph in near:
            filling.insert(draw.rng.randrange(len(filling) + 1), paragraph)
        filling.insert(round(draw.place.depth * len(filling)), fact.paragraph)
        question = f"{fact.question} Answer briefly, from the paragraphs above."
        return Sample(HEAD + _numbered(filling), (Question(question, fact.answers, NEW_TOKENS),))


class TwoParagraphs(Task):
    """Two paragraphs are needed: the birthplace of a person, and what the place is known for."""

    name = "qa_2"

    def make(self, draw: Draw, size: int) -> Sample:
        rng, names = draw.rng, draw_pseudo_words(draw.rng)
        things = rng.sample(NOUNS, NEAR + 1)
        births, fames, people = list[str](), list[str](), list[str]()
        for thing in things:
            person, town = f"{next(names).title()} {next(names).title()}", next(names).title()
            people.append(person)
            births.append(rng.choice(_BIRTHS).format(person=person, town=town))
            fames.append(rng.choice(_FAMES).format(town=town, thing=thing))
        filling = _strangers(draw, size, (things[0],))
        for paragraph in births[1:] + fames[1:]:
            filling.insert(rng.randrange(len(filling) + 1), paragraph)
        # half the text lies between the two that count
        for depth, paragraph in sorted([(draw.place.depth, fames[0]), ((draw.place.depth + 0.5) % 1, births[0])]):
            filling.insert(round(depth * len(filling)), paragraph)
        question = f"{people[0]} was born in a town. What is that town known for? Answer from the paragraphs above."
        return Sample(HEAD + _numbered(filling), (Question(question, (things[0],), NEW_TOKENS),))


@cache
def manual_facts() -> tuple[Fact, ...]:
    """The questions about the field manual with the paragraphs of their answers.

    Raises:
        StorageError: the sample document, which is part of the package, is not there.
    """
    try:
        manual = (SAMPLES / "field-manual.md").read_text(encoding="utf-8")
        asked: list[dict[str, Any]] = json.loads((SAMPLES / "questions.json").read_text(encoding="utf-8"))["questions"]
    except OSError as error:
        raise StorageError(f"{error.filename} cannot be read ({error.strerror}); install satchel again") from None
    sections = {part.partition("\n")[0].strip(): part for part in _SECTION.split(manual)}
    facts = []
    for entry in asked:
        answers = tuple(entry["answers"])
        blocks = sections[entry["section"]].split("\n\n")
        first = next(i for i, block in enumerate(blocks) if all(_has(block, answer) for answer in answers))
        begin = first - blocks[first].startswith("    ")  # a calculation belongs to the paragraph before it
        facts.append(Fact(entry["question"], answers, " ".join(map(_plain, blocks[begin : first + 1]))))
    return tuple(facts)


def _strangers(draw: Draw, size: int, answers: tuple[str, ...]) -> list[str]:
    """``size`` paragraphs of the text that do not have the answer."""
    usable = [text for text in draw.haystack.paragraphs if not _gives_away(text, answers)]
    usable = usable or ["Nothing is said here."]
    return around(usable, draw.rng.randrange(len(usable)), size)


def _plain(block: str) -> str:
    """A block of Markdown in one line, a table in lines, without the marks of a quotation."""
    return block.strip() if block.startswith("|") else " ".join(block.replace("\n> ", " ").removeprefix("> ").split())


def _has(text: str, part: str) -> bool:
    return part.lower() in text.lower()


def _gives_away(text: str, answers: tuple[str, ...]) -> bool:
    return any(_has(text, answer) for answer in answers)


def _numbered(paragraphs: list[str]) -> str:
    return "\n\n".join(f"Paragraph {number}: {text}" for number, text in enumerate(paragraphs, 1))
