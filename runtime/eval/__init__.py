"""Evaluation without downloads: what a policy costs in answers, beside the full cache.

``run.py`` is the entrance. ``suites.py`` lists the suites; tasks are made by ``needles.py``, ``tracing.py``,
``counting.py`` and ``answering.py`` from a ``haystack.py`` and filled to a context by ``sizing.py``; ``perplexity.py``
compares distributions. ``sides.py`` says who is evaluated, ``results.py`` keeps what is done, ``report.py`` and
``plot.py`` show it.
"""

from __future__ import annotations

from .conversations import check_tasks
from .plot import check_plot, write_plot
from .report import Report, SideReport
from .run import DEFAULT_SEED, Evaluation, Order, prepare
from .sides import name_sides
from .suites import find_suite, suite_names

__all__ = [
    "DEFAULT_SEED",
    "Evaluation",
    "Order",
    "Report",
    "SideReport",
    "check_plot",
    "check_tasks",
    "find_suite",
    "name_sides",
    "prepare",
    "suite_names",
    "write_plot",
]
