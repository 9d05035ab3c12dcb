"""What a suite is: a name, the items to measure, and how their records become figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...devices.reporting import Progress
from .haystack import Haystack
from .sides import Runner
from .sizing import Speaker


@dataclass(frozen=True)
class Asked:
    """What a person asked for, with the model's own way to speak. ``context`` in tokens; ``windows`` of perplexity."""

    speaker: Speaker
    haystack: Haystack
    context: int
    samples: int
    windows: int
    tasks: tuple[str, ...]
    seed: int


class Item(Protocol):
    """The smallest thing that is measured, kept and not measured again."""

    @property
    def task(self) -> str: ...

    @property
    def label(self) -> str:
        """Names it within its task."""

    def measure(
        self, runner: Runner, progress: Progress, *, rows: Path | None, reference: Path | None
    ) -> dict[str, Any]:
        """A record for the results, with the label as ``sample``.

        ``rows``: where to keep log-probabilities that others are compared with; ``reference``: such a file.
        """


class Suite(ABC):
    """One row of ``satchel eval --suite``."""

    name: str
    about: str
    default_samples: int
    metrics: tuple[str, ...]
    """Keys of `summary`, the one that counts first."""
    compares_rows: bool = False
    """Whether samples are compared with those of the full cache position by position."""

    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """Names that ``--tasks`` may choose from."""

    @abstractmethod
    def items(self, asked: Asked) -> list[Item]:
        """What to measure. Raises ContextLengthError with the smallest context that works."""

    @abstractmethod
    def identity(self, asked: Asked) -> Mapping[str, Any]:
        """What its results depend on beyond model, task, context, seed, text and side."""

    @abstractmethod
    def summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        """Figures over the records of one task."""
