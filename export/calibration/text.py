"""What a model is calibrated on: windows of a person's text, in the model's tokens, drawn by a seed.

Some are learnt from, the others say how well that went.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ...errors import OptionError

WINDOW_TOKENS = 1024  # KVzap's texts have 750 to 1,250: attention thins out with length, and labels with it
LEAST_WINDOW, MOST_WINDOW = 16, 1 << 16
HELD_OUT = 8  # one window of so many, at least one
TARGETS = ("repeat", "later")


@dataclass(frozen=True)
class Window:
    """A piece of text as the decoder reads it: tokens ``first`` ... ``end`` of ``ids`` are labelled, and from
    ``repeated`` on they come again (None: they do not).
    """

    ids: tuple[int, ...]
    first: int
    end: int
    repeated: int | None


@dataclass(frozen=True)
class Passkeys:
    """What passkeys in a text are made of, in token ids: a cue (of which, each text has one at most once), some words,
    and the end of the sentence. ``question``: what a conversation has after a text when all of them are asked for.
    """

    cues: tuple[tuple[int, ...], ...] = ()
    words: tuple[tuple[int, ...], ...] = ()
    end: tuple[int, ...] = ()
    question: tuple[int, ...] = ()


@dataclass(frozen=True)
class Text:
    """Token ids: of the text; of what a conversation has before it; of the request to repeat it; and of passkeys."""

    ids: tuple[int, ...]
    before: tuple[int, ...] = ()
    request: tuple[int, ...] = ()
    passkeys: Passkeys = Passkeys()

    @property
    def sha256(self) -> str:
        """Of all ids but the passkeys', in hex digits."""
        parts = [np.asarray(ids, "<i8").tobytes() for ids in (self.ids, self.before, self.request)]
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()


@dataclass(frozen=True)
class Order:
    """What is wanted. ``tokens``: at most so many of the text, in windows all over it; None: all."""

    window_tokens: int = WINDOW_TOKENS
    tokens: int | None = None
    target: str = TARGETS[0]
    seed: int = 0

    def __post_init__(self) -> None:
        if not LEAST_WINDOW <= self.window_tokens <= MOST_WINDOW:
            raise OptionError(f"window is {self.window_tokens} tokens; give {LEAST_WINDOW} to {MOST_WINDOW}")
        if self.tokens is not None and self.tokens < 2 * self.window_tokens:
            raise OptionError(
                f"{self.tokens} tokens are less than two windows of {self.window_tokens}; give more, or smaller windows"
            )
        if self.target not in TARGETS:
            raise OptionError(f"target {self.target!r} is not known; choose {' or '.join(TARGETS)}")
        if self.seed < 0:
            raise OptionError(f"seed is {self.seed}; give 0 or more")


def cut_windows(text: Text, order: Order) -> list[Window]:
    """The windows in the order that they are read in: those that are learnt from, then those held out.

    Raises:
        OptionError: the text is shorter than two windows.
    """
    size = order.window_tokens
    count = len(text.ids) // size
    if count < 2:
        raise OptionError(
            f"the text has {len(text.ids):,} tokens, calibrating needs two windows of {size:,} or more; give more "
            "text, or a smaller window"
        )
    places = np.random.default_rng(order.seed).permutation(count)
    if order.tokens is not None:
        places = places[: order.tokens // size]
    first = len(text.before)
    windows = []
    for place in places:
        piece = text.ids[place * size : (place + 1) * size]
        ids, repeated = (*text.before, *piece), None
        if order.target == "repeat":
            ids, repeated = (*ids, *text.request, *piece), first + size + len(text.request)
        windows.append(Window(ids, first, first + size, repeated))
    return windows


def held_out(windows: int) -> int:
    """How many of them."""
    return max(1, windows // HELD_OUT)
