"""The tokens that both sides read: of a person's own file, or of prose made up on the spot."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import DocumentError
from ..documents import read_documents
from ..tokenizer import Tokenizer

BUILT_IN = "built-in prose"
SEED = 7
SENTENCES_AT_A_TIME = 400

_WHO = ("keeper", "courier", "archivist", "pilot", "surveyor", "baker", "warden", "gardener", "clerk")
_WHERE = ("harbour", "mill", "library", "north gate", "workshop", "orchard", "ferry", "tower", "quarry")
_WHAT = ("ledger", "lantern", "map", "seal", "rope", "letter", "bell", "crate", "key", "kettle")
_DID = ("carried", "repaired", "lost", "weighed", "copied", "hid", "returned", "counted", "sold", "painted")
_WHEN = ("at dawn", "before the storm", "in the third week", "after the count", "late in the year")
_WHY = (
    "because the old one had worn out",
    "although nobody had asked for it",
    "so that the others could rest",
    "as the rules of the house demand",
    "while the river was still high",
    "to settle an old argument",
)
_SHAPES = (
    "{When}, the {who} of the {where} {did} the {what} {why}.",
    "The {who} {did} {number} {what}s at the {where}, {why}.",
    "Entry {number}: the {what} was last seen near the {where}; the {who} {did} it {when}.",
    "Whoever keeps the {where} shall pay {number} coins to the {who}, {why}.",
)


@dataclass(frozen=True)
class Text:
    """Token ids, where they are from, and how often that text was begun (1: it was long enough)."""

    ids: list[int]
    source: str
    repeats: int


def make_text(tokenizer: Tokenizer, tokens: int, file: Path | None = None) -> Text:
    """Exactly ``tokens`` ids: a longer text is cut, a shorter one read again from its beginning.

    Raises:
        DocumentError: ``file`` cannot be read as text or has none.
    """
    if file is None:
        return Text(_prose_ids(tokenizer, tokens), BUILT_IN, 1)
    segments = [(read_documents([file]).text, False)]
    ids, again = tokenizer.encode_segments(segments), tokenizer.encode_segments(segments, start=False)
    if not again:
        raise DocumentError(f"{file} has no text to measure with; give another --text or leave it out")
    repeats = 1
    while len(ids) < tokens:
        ids += again
        repeats += 1
    return Text(ids[:tokens], str(file), repeats)


def sentences(seed: int = SEED) -> Iterator[str]:
    """English sentences without end and without a loop, the same ones every time."""
    rng = random.Random(seed)
    while True:
        when = rng.choice(_WHEN)
        yield rng.choice(_SHAPES).format(
            When=when.capitalize(), when=when, who=rng.choice(_WHO), where=rng.choice(_WHERE),
            did=rng.choice(_DID), what=rng.choice(_WHAT), why=rng.choice(_WHY), number=rng.randrange(2, 9999),
        )  # fmt: skip


def _prose_ids(tokenizer: Tokenizer, tokens: int) -> list[int]:
    source, ids = sentences(), list[int]()
    while len(ids) < tokens:
        block = " ".join(next(source) for _ in range(SENTENCES_AT_A_TIME)) + "\n\n"
        ids += tokenizer.encode_segments([(block, False)], start=not ids)
    return ids[:tokens]
