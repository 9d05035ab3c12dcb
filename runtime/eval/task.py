"""What an evaluation asks: a document, questions about it, and the words that right answers contain.

A task makes samples of any size. The document is complete before the first question is known, as a reader of ours
would have it; ``sizing.py`` finds the size that fills a context.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .haystack import Haystack

GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread evenly however many are taken


@dataclass(frozen=True)
class Question:
    """A question; a right answer contains every one of ``references``, upper and lower case apart."""

    text: str
    references: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """A document and the questions of one conversation about it."""

    document: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Place:
    """Which sample of a task: ``label`` names it in results, ``depth`` (0 to 1) is where its first fact is hidden."""

    label: str
    index: int
    depth: float

    @classmethod
    def spread(cls, index: int) -> Place:
        """The sample of this number: depths are spread whatever the number of samples, and none depends on it."""
        return cls(str(index), index, (index + 0.5) * GOLDEN % 1)


@dataclass(frozen=True)
class Draw:
    """What a sample is drawn from. A new one with a new ``rng`` for each size that is tried."""

    rng: random.Random
    haystack: Haystack
    place: Place
    context: int


class Task(ABC):
    """One kind of samples. The facts must not depend on the size, so they are drawn before the filling."""

    name: str
    paper: ClassVar[str] = "RULER, arXiv 2404.06654"
    least_size: ClassVar[int] = 1

    @abstractmethod
    def make(self, draw: Draw, size: int) -> Sample:
        """A sample with ``size`` units of filling (sentences, lines, words or paragraphs)."""


def score(answer: str, references: Sequence[str]) -> float:
    """The share of ``references`` that stand in ``answer``, upper and lower case apart: 0 to 1."""
    folded = answer.lower()
    return sum(reference.lower() in folded for reference in references) / len(references)


def in_words(items: Sequence[str]) -> str:
    """"a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
