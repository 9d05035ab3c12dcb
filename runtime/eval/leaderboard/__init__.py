"""``satchel eval --leaderboard``: every method at every budget, on every suite, as one table.

``methods.py`` says who takes part, ``board.py`` measures, with the suites, samples and results of ``satchel eval``;
``document.py`` gathers what was found, ``earlier.py`` keeps what a table has from before, ``table.py`` and
``picture.py`` show it.
"""

from __future__ import annotations

from .board import DEFAULT_CONTEXT, RULER_TASKS, Board, BoardOrder, prepare_board
from .document import describe, ranked, winners
from .earlier import adopt, read_earlier
from .methods import DEFAULT_BUDGETS, all_methods, parse_budgets
from .picture import draw
from .table import to_markdown

__all__ = [
    "DEFAULT_BUDGETS",
    "DEFAULT_CONTEXT",
    "RULER_TASKS",
    "Board",
    "BoardOrder",
    "adopt",
    "all_methods",
    "describe",
    "draw",
    "parse_budgets",
    "prepare_board",
    "ranked",
    "read_earlier",
    "to_markdown",
    "winners",
]
