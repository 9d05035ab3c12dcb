"""Training the head of one layer by gradients, and what a head is worth on windows that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .decoder import Tensor, require_torch
from .files import Floats
from .ridge import FitSums

BETAS = (0.9, 0.95)
WARM_UP = 0.1  # of the steps; then the rate falls in a line to 0
LARGEST_GRADIENT = 0.5
BEST = 8  # the best of so many tokens are those that a tight budget keeps
FIGURES = ("loss", "r2", "spearman", "best_eighth")


def moments(values: Floats) -> tuple[Floats, Floats]:
    """Mean and spread of each of [windows, rows, n]; a spread that is rounding only counts as 1."""
    mean = values.mean(axis=(0, 1), dtype=np.float64)
    spread = values.std(axis=(0, 1), dtype=np.float64)
    return mean.astype(np.float32), np.where(spread > 1e-3 * np.abs(mean), spread, 1).astype(np.float32)


def unscaled(weight: Floats, bias: Floats, mean: Floats, spread: Floats) -> tuple[Floats, Floats]:
    """Of a linear map of inputs that had `moments` taken out, as a map of the inputs."""
    plain: Floats = weight / spread
    moved: Floats = bias - plain @ mean
    return plain, moved


def descend(
    weights: Sequence[Tensor], loss: Callable[[], Tensor], steps: int, *, rate: float,
    report: Callable[[int, int], object],
) -> None:  # fmt: skip
    """Changes ``weights`` by ``steps`` steps of AdamW down ``loss``, which draws its tokens itself; ``report(done,
    total)`` counts steps."""
    torch = require_torch()
    warm = max(int(WARM_UP * steps), 1)
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warm if step < warm else (steps - step) / max(steps - warm, 1)
    )
    for step in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_value_(weights, LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        report(step + 1, steps)


def figures(loss: float, scores: Floats, labels: Floats) -> Floats:
    """`FIGURES` of ``scores`` and ``labels`` [windows, rows, K]: the loss; the share of the labels' variance that they
    explain; and within a window and KV head, on average, the rank correlation and the share of the labels' best eighth
    that the scores' best eighth has. A budget goes by these two.
    """
    fit, rows = FitSums(1, 1, labels.shape[2]), labels.shape[1]
    for predicted, wanted in zip(scores, labels, strict=True):
        fit.add(0, wanted.astype(np.float64), [predicted.astype(np.float64)])
    ranks = [np.argsort(np.argsort(part, axis=1, kind="stable"), axis=1) for part in (scores, labels)]
    centred = [part - part.mean(axis=1, keepdims=True) for part in ranks]
    spread = np.square(centred[1]).sum(axis=1)  # the same of both
    spearman = ((centred[0] * centred[1]).sum(axis=1) / np.maximum(spread, 1)).mean()
    best = max(rows // BEST, 1)
    shared = np.logical_and(*(part >= rows - best for part in ranks)).sum(axis=1).mean() / best
    return np.array([loss, fit.r2()[0, 0], spearman, shared], np.float32)
