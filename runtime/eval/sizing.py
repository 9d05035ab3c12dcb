"""Filling a context: the largest sample of a task whose document, questions and longest answers fit into it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..chat_template import ChatTemplate
from ..tokenizer import Tokenizer
from .haystack import Haystack
from .task import Draw, Place, Sample, Task


@dataclass(frozen=True)
class Speaker:
    """Conversations as token ids, with a model's own template and tokenizer."""

    tokenizer: Tokenizer
    template: ChatTemplate

    def document_ids(self, document: str) -> list[int]:
        """What is read before the first question."""
        return self.tokenizer.encode_segments(self.template.prefix(None, document))

    def question_ids(self, question: str, *, first: bool) -> list[int]:
        """A question and everything up to where its answer begins."""
        segments = self.template.rest(question) if first else self.template.next_turn(question)
        return self.tokenizer.encode_segments(segments, start=False)

    def tokens(self, sample: Sample) -> int:
        """Tokens of the whole conversation, when every answer is as long as it may be."""
        turns = sum(
            len(self.question_ids(question.text, first=not index)) + question.max_new_tokens
            for index, question in enumerate(sample.questions)
        )
        return len(self.document_ids(sample.document)) + turns


@dataclass(frozen=True)
class Filler:
    """Makes samples of a haystack for a context of ``context`` tokens. The same ``seed`` gives the same bytes."""

    speaker: Speaker
    haystack: Haystack
    context: int
    seed: int

    def make(self, task: Task, place: Place, size: int) -> Sample:
        """A sample of ``size`` units, whether it fits or not."""
        rng = random.Random(f"{self.seed}/{task.name}/{place.label}")
        return task.make(Draw(rng, self.haystack, place, self.context), size)

    def least_tokens(self, task: Task, place: Place) -> int:
        """Tokens of the smallest sample: a context must not be smaller."""
        return self.speaker.tokens(self.make(task, place, task.least_size))

    def fill(self, task: Task, place: Place) -> Sample:
        """The largest sample that fits; the smallest one must (see `least_tokens`)."""

        def fits(size: int) -> bool:
            return self.speaker.tokens(self.make(task, place, size)) <= self.context

        return self.make(task, place, largest(fits, task.least_size))


def largest(fits: Callable[[int], bool], least: int) -> int:
    """The largest number from ``least`` on that fits, if what is larger than one that does not fit doesn't, too."""
    step = 1
    while fits(least + step):
        step *= 2
    good, bad = least + step // 2, least + step
    if step == 1:
        good = least
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
