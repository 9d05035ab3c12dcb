"""Needles in a haystack: RULER's eight retrieval tasks, the plain needle test, and eight needles in one conversation.

A needle is "One of the special magic numbers for KEY is: VALUE." The filling is noise, a real text, or other needles.
RULER begins the answer for the model; we ask plainly, as a person would, and say how to list several. Sizes count
sentences, lines or needles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .haystack import NOISE, plant
from .task import Draw, Question, Sample, Task, in_words
from .words import draw_keys, draw_values

NEW_TOKENS = 128
PLURAL = {"number": "numbers", "uuid": "uuids"}


@dataclass(frozen=True)
class NeedleTask(Task):
    """``keys`` different keys with ``values`` values each; the first ``asked`` keys are asked for.

    ``filling``: ``noise``, ``text`` or ``needles``; ``key``: ``words`` or ``uuid``; ``value``: ``number`` or ``uuid``.
    ``turns``: one question for each key asked, in shuffled order, instead of one for all.
    """

    name: str
    filling: str
    key: str = "words"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1
    turns: bool = False

    def make(self, draw: Draw, size: int) -> Sample:
        rng, place = draw.rng, draw.place
        keys, values = draw_keys(rng, self.key), draw_values(rng, self.value)
        chosen = [next(keys) for _ in range(self.keys)]
        facts = {key: tuple(next(values) for _ in range(self.values)) for key in chosen}
        order = list(chosen[: self.asked])
        rng.shuffle(order)
        pairs = [(key, value) for key in chosen for value in facts[key]]
        count = len(pairs)
        # the first one stands exactly where asked, the others at even distances
        places = [place.depth + index / count for index in range(count)]
        depths = [depth if depth <= 1 else depth - 1 for depth in places]
        needles = [self._needle(key, value) for key, value in pairs]
        filling = self._filling(draw, size, keys, values)
        text = plant(filling, zip(depths, needles, strict=True))
        groups = [[key] for key in order] if self.turns else [chosen[: self.asked]]
        return Sample(self._head() + text, tuple(self._question(group, facts) for group in groups))

    def _head(self) -> str:
        return (
            f"Some special magic {PLURAL[self.value]} are hidden in the text below. Remember them: "
            "questions about them follow after the text.\n\n"
        )

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {PLURAL[self.value]} for {key} is: {value}."

    def _filling(self, draw: Draw, size: int, keys: Iterator[str], values: Iterator[str]) -> list[str]:
        if self.filling == "noise":
            return [NOISE] * size
        if self.filling == "needles":
            return [self._needle(next(keys), next(values)) + "\n" for _ in range(size)]
        return draw.haystack.sentences(draw.rng, size)

    def _question(self, keys: list[str], facts: dict[str, tuple[str, ...]]) -> Question:
        references = tuple(value for key in keys for value in facts[key])
        if len(references) == 1:
            text = f"What is the special magic {self.value} for {keys[0]} mentioned in the text above?"
        else:
            text = (
                f"What are all the special magic {PLURAL[self.value]} for {in_words(keys)} mentioned in the text "
                "above?"
            )
        if len(keys) > 1:  # else small models begin to recite the text
            text += " Answer with a line for each."
        return Question(text, references, NEW_TOKENS)


RULER_NEEDLES = (
    NeedleTask("single_1", "noise"),
    NeedleTask("single_2", "text"),
    NeedleTask("single_3", "text", value="uuid"),
    NeedleTask("multikey_1", "text", keys=4),
    NeedleTask("multikey_2", "needles"),
    NeedleTask("multikey_3", "needles", key="uuid", value="uuid"),
    NeedleTask("multivalue", "text", values=4),
    NeedleTask("multiquery", "text", keys=4, asked=4),
)
NEEDLE = NeedleTask("needle", "text")
MULTITURN = NeedleTask("multiturn", "text", keys=8, asked=8, turns=True)
