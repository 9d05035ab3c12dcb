"""The text that facts are hidden in: a person's own documents, or made-up prose, in pieces that fit together again."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice

from ...errors import DocumentError
from ..bench.text import sentences

BUILT_IN_SENTENCES = 4000
LONGEST_PIECE = 400  # characters; longer stretches without the end of a sentence are cut
PARAGRAPH = 300  # characters that a paragraph has at least
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
# after the end of a sentence (CJK marks need no space), and at blank lines
_BOUNDARY = re.compile(r"(?<=[.!?…])[\"')\]]*\s+|(?<=[。！？])\s*|\n\s*\n\s*")
_WORD = re.compile(r"\b[a-z]{5,10}\b")


class Haystack:
    """A text that is read in a circle, so that it is always long enough."""

    def __init__(self, text: str) -> None:
        """Raises DocumentError for a text of white space."""
        if not text.strip():
            raise DocumentError("the text has no words to hide facts in; give another --text or leave it out")
        self.text = text

    @classmethod
    def built_in(cls) -> Haystack:
        """Made-up prose, the same every time."""
        return cls(" ".join(islice(sentences(), BUILT_IN_SENTENCES)) + "\n\n")

    @property
    def sha256(self) -> str:
        """Identifies the text."""
        return hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()

    @cached_property
    def pieces(self) -> list[str]:
        """The text in sentences with the white space behind them: joined, they are the text."""
        found, begin = list[str](), 0
        for match in _BOUNDARY.finditer(self.text):
            found += _cut(self.text[begin : match.end()])
            begin = match.end()
        found += _cut(self.text[begin:])
        if not found[-1][-1:].isspace():
            found[-1] += "\n\n"  # so that the beginning can follow the end
        return found

    @cached_property
    def words(self) -> list[str]:
        """Its different words of 5 to 10 plain letters, in the order of their first use."""
        return list(dict.fromkeys(_WORD.findall(self.text.lower())))

    @cached_property
    def paragraphs(self) -> list[str]:
        """Runs of whole sentences of some 300 characters, white space evened out."""
        found, collected = list[str](), ""
        for piece in self.pieces:
            collected += piece
            if len(collected) >= PARAGRAPH:
                found.append(" ".join(collected.split()))
                collected = ""
        rest = " ".join(collected.split())
        return [paragraph for paragraph in [*found, rest] if paragraph]

    def sentences(self, rng: random.Random, count: int) -> list[str]:
        """``count`` pieces in order, from a random place on."""
        return around(self.pieces, rng.randrange(len(self.pieces)), count)


def around(items: Sequence[str], first: int, count: int) -> list[str]:
    """``count`` items from ``first`` on, in a circle."""
    return [items[(first + index) % len(items)] for index in range(count)]


def plant(pieces: Sequence[str], planted: Iterable[tuple[float, str]]) -> str:
    """The pieces as one text, with each (depth, sentence) at the boundary that lies nearest to its depth.

    Depths are shares of the pieces' characters; sentences at the same boundary stand in the order of their depths.
    """
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    at: dict[int, list[str]] = {}
    for depth, sentence in sorted(planted, key=lambda pair: pair[0]):
        target = depth * starts[-1]
        index = min(range(len(starts)), key=lambda place: abs(starts[place] - target))
        at.setdefault(index, []).append(sentence)
    parts = list[str]()
    for index in range(len(starts)):
        for sentence in at.get(index, ()):
            before = pieces[max(index - 1, 0)]
            parts.append(sentence + ("\n" if before.endswith("\n") else " "))
        if index < len(pieces):
            parts.append(pieces[index])
    return "".join(parts).rstrip()


def _cut(piece: str) -> list[str]:
    """A piece, or several when it is too long: at white space if there is any, else anywhere."""
    found = list[str]()
    while len(piece) > LONGEST_PIECE:
        place = max(piece.rfind(mark, 1, LONGEST_PIECE) for mark in (" ", "\n"))
        end = place + 1 if place > 0 else LONGEST_PIECE
        found.append(piece[:end])
        piece = piece[end:]
    return [*found, piece] if piece else found
