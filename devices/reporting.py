"""How long work tells what it is doing: two plain callables, so that a library user can pass ``print``."""

from __future__ import annotations

import logging
from typing import Protocol

_log = logging.getLogger("satchel")


class Progress(Protocol):
    """Called often: ``stage`` is a short word ("downloading"), ``done`` and ``total`` are bytes or tokens."""

    def __call__(self, stage: str, done: int, total: int, /) -> object: ...


class Notice(Protocol):
    """Called seldom, with one line that a person should know ("another process is fetching ...; waiting")."""

    def __call__(self, text: str, /) -> object: ...


def no_progress(stage: str, done: int, total: int, /) -> None:
    """The progress of a caller who asked for none."""


def log_notice(text: str, /) -> None:
    """The notice of a caller who gave none: a line at level INFO of the logger ``satchel``."""
    _log.info("%s", text)
