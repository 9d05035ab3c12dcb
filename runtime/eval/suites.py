"""The suites by name: a new one is a file of this folder and a row here."""

from __future__ import annotations

from ...errors import OptionError
from .conversations import MULTITURN_SUITE, NEEDLE_SUITE, RULER_SUITE
from .perplexity import PERPLEXITY_SUITE
from .suite import Suite

_SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (NEEDLE_SUITE, RULER_SUITE, MULTITURN_SUITE, PERPLEXITY_SUITE)
}


def suite_names() -> tuple[str, ...]:
    """The names of all suites."""
    return tuple(_SUITES)


def find_suite(name: str) -> Suite:
    """The suite of that name. Raises OptionError."""
    if name not in _SUITES:
        raise OptionError(f"suite {name!r} is not known; choose one of {', '.join(_SUITES)}")
    return _SUITES[name]
