"""Counting over the whole text: RULER's common words (``cwe``) and frequent words (``fwe``).

Nothing is hidden at a place here: every part of the text counts. RULER begins the answer for the model; we ask plainly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import pi

from .task import Draw, Question, Sample, Task
from .words import draw_letters, draw_pseudo_words

COMMON = 10
LONG_CONTEXT = 4096  # tokens; from there on words come more often
ZETA_2 = pi * pi / 6
CODED_LETTERS = 6
TOKENS_PER_CODED_WORD = 50  # of the context, for each different word
FREQUENT = 3


class CommonWords(Task):
    """Ten words come 30 times each, all others 3 times (6 times and once below 4,096 tokens), shuffled and numbered.

    The words are of the given text; RULER has a list of English words for it. RULER also puts an example with its
    answer before the list: small models repeat that answer, as it stands there with the same question, so there is
    none here. Sizes count the other words.
    """

    name = "cwe"
    least_size = 10

    def make(self, draw: Draw, size: int) -> Sample:
        often, seldom = (30, 3) if draw.context >= LONG_CONTEXT else (6, 1)
        words = _words(draw)
        common = _take(words, COMMON)
        listed = common * often + _take(words, size, avoid=common) * seldom
        draw.rng.shuffle(listed)
        document = (
            "Below is a numbered list of words, in which some come more often than the others. Remember those that "
            "come most often.\n\n" + " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        )
        question = f"What are the {COMMON} most common words in the list above?"
        return Sample(document, (Question(question, tuple(common), 120),))


class FrequentWords(Task):
    """Made-up words with counts that fall by Zipf's law; the first is dots, ranks 2 to 4 are asked for.

    Sizes count words, N; the word of rank k comes ⌊N / (k² ζ(2))⌋ times.
    """

    name = "fwe"
    least_size = 60  # below, ranks 4 and 5 come equally often

    def make(self, draw: Draw, size: int) -> Sample:
        letters = draw_letters(draw.rng, CODED_LETTERS)
        different = max(draw.context // TOKENS_PER_CODED_WORD, FREQUENT + 2)
        ranked = ["...", *(next(letters) for _ in range(different - 1))]
        counts = [int(size / (rank * rank * ZETA_2)) for rank in range(1, different + 1)]
        words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        draw.rng.shuffle(words)
        document = (
            "Read the coded text below and keep track of how often each coded word comes. The dots are no word.\n\n"
            + " ".join(words)
        )
        question = (
            f"Without the dots, what are the {FREQUENT} most frequent words in the coded text above? "
            "Answer with these words alone."
        )
        return Sample(document, (Question(question, tuple(ranked[1 : 1 + FREQUENT]), 50),))


def _words(draw: Draw) -> Iterator[str]:
    """The words of the text in random order, then made-up ones."""
    known = list(draw.haystack.words)
    draw.rng.shuffle(known)
    yield from known
    taken = set(known)
    yield from (word for word in draw_pseudo_words(draw.rng) if word not in taken)


def _take(words: Iterator[str], count: int, avoid: Sequence[str] = ()) -> list[str]:
    """The next words of which none contains another one or one of ``avoid``: scores look for parts of words."""
    found = list[str]()
    apart = avoid or found
    while len(found) < count:
        word = next(words)
        if not any(word in other or other in word for other in apart):
            found.append(word)
    return found
