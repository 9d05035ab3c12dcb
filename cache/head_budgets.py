"""How a layer's budget is shared among its KV heads.

``uniform``: each head keeps the same number of tokens. ``adaptive`` (AdaKV, arXiv 2407.11550): the heads compete for
the layer's budget with their scores, and each keeps at least a fifth of the uniform share.

Departure: what moves from one head to another is a whole page of 64 tokens. So all heads together have no more pages
than under ``uniform``, now and after any number of tokens that is appended to each, and no limit in bytes is touched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import kernels

UNIFORM, ADAPTIVE = "uniform", "adaptive"
HEAD_BUDGETS = (UNIFORM, ADAPTIVE)
LEAST_SHARE = 0.2
_LARGEST = 1e30  # stands for what must be kept, so that a page's mean is a number


@dataclass(frozen=True)
class AdaptiveBudgets:
    """For `satchel methods`."""

    name: str = ADAPTIVE
    paper: str = "AdaKV, arXiv 2407.11550"


def adaptive_budgets(scores: Sequence[NDArray[np.float32]], budget: int, least: int) -> list[int]:
    """How many of its best tokens each head keeps.

    ``scores`` [T] of each head, larger = keep, comparable between heads; they may hold different numbers. ``budget`` is
    the uniform share of a head, ``least`` what each must keep (more, if a fifth of the budget is more).

    Returns:
        numbers b with sum(pages(b + n)) <= heads * pages(budget + n) for every n, none larger than its head.
    """
    page = kernels.PAGE_TOKENS
    least = min(max(least, math.ceil(LEAST_SHARE * budget)), budget)
    lowest = -((budget - least) // page)  # in pages, seen from the uniform share
    steps = []  # pages that a head can keep beyond these: whether it lacks tokens to fill it, minus its mean, the head
    for head, values in enumerate(scores):
        best = np.clip(np.sort(values)[::-1].astype(np.float64), -_LARGEST, _LARGEST)
        for first in range(budget + page * lowest, best.size, page):
            step = best[first : first + page]
            steps.append((step.size < page, -float(step.mean()), head))  # descending within a head
    steps.sort()
    pages = Counter(head for _, _, head in steps[: -lowest * len(scores)])
    return [min(values.size, budget + page * (lowest + pages[head])) for head, values in enumerate(scores)]
