"""Notices when a greedy answer has begun to go round in circles: from there on it would never end."""

from __future__ import annotations

from collections.abc import Sequence

REPEATS = 3
SHORTEST_LOOP_TOKENS = 8  # shorter ones occur in tables, rulers and lists of numbers
LONGEST_LOOP_TOKENS = 200


def goes_in_circles(ids: Sequence[int]) -> bool:
    """Whether ``ids`` end with the same run of tokens, of some length, ``REPEATS`` times over."""
    longest = min(LONGEST_LOOP_TOKENS, len(ids) // REPEATS)
    for length in range(SHORTEST_LOOP_TOKENS, longest + 1):
        last = ids[-length:]
        if all(ids[-length * (i + 1) : -length * i] == last for i in range(1, REPEATS)):
            return len(set(last)) > 1  # a ruler, dots of a table of contents: one token over and over may end
    return False
