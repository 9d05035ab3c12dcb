"""One tree of errors, usable the way the command line and library users need it."""

from __future__ import annotations

import inspect

import pytest
from satchel import errors
from satchel.errors import MemoryLimitError, SatchelError

ERRORS = [value for value in vars(errors).values() if inspect.isclass(value)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_in_the_tree_and_says_what_it_is(error: type[SatchelError]) -> None:
    assert issubclass(error, SatchelError)
    assert error.__name__.endswith("Error")
    assert error.__doc__


@pytest.mark.parametrize("error", [error for error in ERRORS if error is not MemoryLimitError])
def test_the_message_is_what_was_given(error: type[SatchelError]) -> None:
    with pytest.raises(SatchelError, match=r"^12 is above 8: use less$"):
        raise error("12 is above 8: use less")


def test_memory_limit_names_the_smallest_limit_that_would_do() -> None:
    with pytest.raises(MemoryLimitError, match=r"^too little$") as caught:
        raise MemoryLimitError("too little", smallest_bytes=900_000_000)
    assert caught.value.smallest_bytes == 900_000_000


def test_the_tree_does_not_swallow_interrupts_or_bugs() -> None:
    assert not issubclass(KeyboardInterrupt, SatchelError)
    assert not issubclass(AssertionError, SatchelError)
    assert SatchelError.__bases__ == (Exception,)
