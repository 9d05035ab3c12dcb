"""A loop is a run of tokens three times over; tables and rulers are none."""

from __future__ import annotations

import pytest
from satchel.runtime.repetition import LONGEST_LOOP_TOKENS, goes_in_circles

LOOP = list(range(20))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], False),
        (LOOP * 2, False),
        (LOOP * 3, True),
        ([7, 8, *LOOP * 3], True),
        ([*LOOP * 3, 99], False),
        ([1, 2, 3] * 2, False),
        ([1, 2, 3] * 9, False),  # nine times three is three times nine, too
        ([0, 1] * 20, False),
        ([5] * 100, False),
        (list(range(LONGEST_LOOP_TOKENS + 1)) * 3, False),
        (list(range(1000)), False),
    ],
)
def test_loops(ids: list[int], expected: bool) -> None:
    assert goes_in_circles(ids) is expected
