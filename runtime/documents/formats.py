"""The shape of a format, and how a source finds its format. The formats themselves are one file each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .source import Report, Source


def _never(source: Source, head: bytes) -> bool:  # noqa: ARG001
    return False


@dataclass(frozen=True)
class Format:
    """One kind of document.

    Attributes:
        name: for people, as in messages.
        extensions: lower case with the dot; decides before the content does.
        read: the whole text of a source; raises ``DocumentError``.
        recognizes: whether this looks like the format, from the first bytes; asked when no extension decides.
    """

    name: str
    extensions: tuple[str, ...]
    read: Callable[[Source, Report], str]
    recognizes: Callable[[Source, bytes], bool] = _never


def choose(source: Source, formats: Sequence[Format]) -> Format:
    """The format of ``source``; the last of ``formats`` takes what nothing else does."""
    for candidate in formats:
        if source.extension in candidate.extensions:
            return candidate
    head = source.head()
    for candidate in formats:
        if candidate.recognizes(source, head):
            return candidate
    return formats[-1]
