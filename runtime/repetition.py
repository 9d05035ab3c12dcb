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
            return not _is_short_loop(last)
    return False


def _is_short_loop(ids: Sequence[int]) -> bool:
    """Whether a few tokens over and over make it up: a row of zeros, dots or table marks, which may well end."""
    return any(all(a == b for a, b in zip(ids, ids[n:], strict=False)) for n in range(1, SHORTEST_LOOP_TOKENS))
