"""Variable tracking: names that get their value from one another, far apart in noise (RULER's ``vt``).

One chain of four hops; an example with another chain stands before the text, as in RULER. RULER begins the answer for
the model and lets it write 30 tokens; we ask plainly, so the limit is 64.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

from .haystack import NOISE, plant
from .task import Draw, Question, Sample, Task
from .words import draw_letters

HOPS = 4
EXAMPLE_LINES = 5
NEW_TOKENS = 64
NAME_LETTERS = 5


class VariableTracking(Task):
    """``VAR A = 12345``, ``VAR B = VAR A``, …: which variables have the value? Sizes count lines of noise."""

    name = "vt"

    def make(self, draw: Draw, size: int) -> Sample:
        names = draw_letters(draw.rng, NAME_LETTERS, upper=True)
        example, example_value, example_names = _chain(draw.rng, names, 0.5, EXAMPLE_LINES)
        text, value, chain = _chain(draw.rng, names, draw.place.depth, size)
        document = (
            "Remember the assignments of variables that are hidden in the text: a question about them follows.\n\n"
            f"An example, with a text of its own:\n{example}\n"
            f"Question: {_ask(example_value)}\nAnswer: {', '.join(example_names)}\n\nThe text:\n{text}"
        )
        return Sample(document, (Question(_ask(value), tuple(chain), NEW_TOKENS),))


def _chain(rng: random.Random, names: Iterator[str], depth: float, lines: int) -> tuple[str, str, list[str]]:
    """A text with a chain of assignments in their order, the value, and the names."""
    value = str(rng.randrange(10_000, 100_000))
    chain = [next(names) for _ in range(HOPS + 1)]
    statements = [f"VAR {chain[0]} = {value}"]
    statements += [f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(chain)]
    depths = [(depth + index) / len(chain) for index in range(len(chain))]
    return plant([NOISE] * lines, zip(depths, statements, strict=True)), value, chain


def _ask(value: str) -> str:
    return (
        f"Which {HOPS + 1} variables have the value {value} in the text above, directly or through another variable? "
        "Answer with their names alone."
    )
