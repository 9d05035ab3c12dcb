"""Locret's retaining head of one layer (arXiv 2410.01805) and its training.

A network with one inner layer: score = outer . SiLU(inner . [q; k; v]), inputs before RoPE, one score for each KV head.
The loss is the paper's: smooth L1 to the labels, and a little of the squared difference between neighbours' scores.

Departures, as we have minutes and some ten thousand tokens where the paper has 30 million: a narrow inner layer and
many steps over few tokens; inputs and labels of mean 0 and spread 1 while training, for which both layers get a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .decoder import Tensor, require_torch
from .descent import WARM_UP, descend, figures, moments, unscaled
from .files import Floats

WIDTH = 128  # of the inner layer; the paper's: 1024
EPOCHS = 10  # over the tokens of the sample; the paper's: 1
SPANS, SPAN_TOKENS = 4, 64  # a step sees so many pieces of windows, of so many neighbours
LEARNING_RATE = 1e-3
SMOOTHING = 0.0025
SETTINGS = [WIDTH, EPOCHS, SPANS, SPAN_TOKENS, LEARNING_RATE, WARM_UP]


@dataclass(frozen=True)
class Head:
    """``inner`` float32 [WIDTH, F], ``inner_bias`` [WIDTH], ``outer`` [K, WIDTH], ``outer_bias`` [K]; or tensors."""

    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """What it says of ``x`` [..., F]: [..., K]. For tensors."""
        inside = x @ self.inner.T + self.inner_bias
        return inside * inside.sigmoid() @ self.outer.T + self.outer_bias


def trained_head(x: Floats, y: Floats, *, seed: int, report: Callable[[int, int], object]) -> Head:
    """The head, of arrays, as `training.Train` wants it."""
    torch = require_torch()
    chance = torch.Generator().manual_seed(seed)
    (x_mean, x_spread), (y_mean, y_spread) = (moments(part) for part in (x, y))
    features, labels = torch.from_numpy((x - x_mean) / x_spread), torch.from_numpy((y - y_mean) / y_spread)
    windows, rows, width = x.shape
    head = Head(
        torch.empty(WIDTH, width).normal_(0, width**-0.5, generator=chance),
        torch.zeros(WIDTH),
        torch.empty(y.shape[2], WIDTH).normal_(0, WIDTH**-0.5, generator=chance),
        torch.zeros(y.shape[2]),
    )
    weights = [part.requires_grad_() for part in vars(head).values()]
    span = min(SPAN_TOKENS, rows)
    steps = max(EPOCHS * windows * rows // (SPANS * span), 1)

    def loss() -> Tensor:
        window = torch.randint(windows, (SPANS, 1), generator=chance)
        place = torch.randint(rows - span + 1, (SPANS, 1), generator=chance) + torch.arange(span)
        return loss_of(torch, head.scores(features[window, place]), labels[window, place])

    seen = SPANS * span  # tokens in a step
    descend(weights, loss, steps, rate=LEARNING_RATE, report=lambda done, of: report(done * seen, of * seen))
    inner, inner_bias, outer, outer_bias = (part.detach().numpy() for part in weights)
    inner, inner_bias = unscaled(inner, inner_bias, x_mean, x_spread)
    return Head(inner, inner_bias, outer * y_spread[:, None], outer_bias * y_spread + y_mean)


def loss_of(torch: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Of scores and labels [pieces, neighbours, K]."""
    rough = (scores[:, 1:] - scores[:, :-1]).square().mean() if scores.shape[1] > 1 else 0.0
    return torch.nn.functional.smooth_l1_loss(scores, labels) + SMOOTHING * rough


def held_out_figures(x: Floats, y: Floats, head: Head) -> Floats:
    """`figures` of a head of arrays on windows that it has not seen."""
    torch = require_torch()
    with torch.inference_mode():
        scores = Head(*(torch.from_numpy(part) for part in vars(head).values())).scores(torch.from_numpy(x))
        loss = float(loss_of(torch, scores, torch.from_numpy(y)))
    return figures(loss, scores.numpy(), y)
