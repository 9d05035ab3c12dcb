"""Attention-Gate of one layer (arXiv 2410.12876) and its training: what a pair will be worth, told from its token and
from those that are read with it.

A small attention over the tokens of a chunk, in which each finds the others that are like it or finds nobody, then a
network with one inner layer: score = outer . SiLU(inner . [q; k; v] + mixed . found), inputs before RoPE, one score for
each KV head. ``found`` is the others' values, weighted by the softmax of query . key over the others and one key that
nobody has, whose logit is ``nobody`` and whose value is 0. So a token that is read alone has found 0.

The loss is smooth L1 to the labels, and the cross entropy of the flag that the paper's gate gives: is the pair among
those that stay, the best eighth of its window?

Departures: the paper's gate sees the whole prompt, is trained by the model's own loss, through a threshold, and by a
loss that holds the share of what it evicts. Here a chunk is what is seen at once, the model is never differentiated,
and the share is in the flag.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .decoder import Tensor, require_torch
from .descent import BEST, descend, figures, moments, unscaled
from .files import Floats

WIDTH = 128  # of the inner layer
SIZE, VALUE_SIZE = 32, 8  # of a query or key, and of a value, of the gate
NOBODY = 4.0  # logit of the key that nobody has, at first
ALIKE = 10.0  # logit of a token that is the same, at first
MIXED = 0.3  # spread of what others say in the inner layer, that of the token's own being 1, at first
EPOCHS = 10  # over the tokens of the sample
STEP_TOKENS = 512
CHUNKS = (1, 64, 128, 256, 512)  # tokens that are read together, in a step; 1: an answer's
MEASURED_CHUNK = 256
LEARNING_RATE = 1e-3
FLAG_SHARE, FLAG_SLOPE = 0.5, 3.0  # of the flag in the loss; logit of a score above the last that stays, per spread
SETTINGS = [
    WIDTH, SIZE, VALUE_SIZE, NOBODY, ALIKE, MIXED, EPOCHS, STEP_TOKENS, CHUNKS, MEASURED_CHUNK, LEARNING_RATE,
    FLAG_SHARE, FLAG_SLOPE,
]  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """float32 ``query`` and ``key`` [SIZE, F], ``value`` [VALUE_SIZE, F], ``inner`` [WIDTH, F], ``outer`` [K, WIDTH],
    each with its bias; ``mixed`` [WIDTH, VALUE_SIZE] and ``nobody`` [1]; or tensors."""

    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor
    nobody: Tensor
    inner: Tensor
    inner_bias: Tensor
    mixed: Tensor
    outer: Tensor
    outer_bias: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """What it says of chunks ``x`` [..., T, F]: [..., T, K]. For tensors."""
        others = 1 - require_torch().eye(x.shape[-2])
        queries, keys = x @ self.query.T + self.query_bias, x @ self.key.T + self.key_bias
        # a token's own place is that of the key that nobody has
        logits = (queries @ keys.transpose(-1, -2) - self.nobody) * others
        found = logits.softmax(dim=-1) * others @ (x @ self.value.T + self.value_bias)
        inside = x @ self.inner.T + self.inner_bias + found @ self.mixed.T
        return inside * inside.sigmoid() @ self.outer.T + self.outer_bias


def trained_gate(x: Floats, y: Floats, *, seed: int, report: Callable[[int, int], object]) -> Gate:
    """The gate, of arrays, as `training.Train` wants it."""
    torch = require_torch()
    chance = torch.Generator().manual_seed(seed)
    (x_mean, x_spread), (y_mean, y_spread) = (moments(part) for part in (x, y))
    features, wanted = torch.from_numpy((x - x_mean) / x_spread), (y - y_mean) / y_spread
    labels, last = torch.from_numpy(wanted), torch.from_numpy(_last_that_stays(wanted))
    windows, rows, width = x.shape

    def drawn(out: int, into: int) -> Tensor:
        return torch.empty(out, into).normal_(0, into**-0.5, generator=chance)

    alike = drawn(SIZE, width) * (ALIKE / SIZE) ** 0.5
    gate = Gate(
        query=alike, query_bias=torch.zeros(SIZE), key=alike.clone(), key_bias=torch.zeros(SIZE),
        value=drawn(VALUE_SIZE, width), value_bias=torch.ones(VALUE_SIZE), nobody=torch.tensor([NOBODY]),
        inner=drawn(WIDTH, width), inner_bias=torch.zeros(WIDTH), mixed=drawn(WIDTH, VALUE_SIZE) * MIXED,
        outer=drawn(y.shape[2], WIDTH), outer_bias=torch.zeros(y.shape[2]),
    )  # fmt: skip
    weights = [part.requires_grad_() for part in vars(gate).values()]
    chunks = sorted({min(size, rows) for size in CHUNKS})

    def loss() -> Tensor:
        size = chunks[int(torch.randint(len(chunks), (1,), generator=chance))]
        count = max(STEP_TOKENS // size, 1)
        window = torch.randint(windows, (count, 1), generator=chance)
        place = torch.randint(rows - size + 1, (count, 1), generator=chance) + torch.arange(size)
        return loss_of(torch, gate.scores(features[window, place]), labels[window, place], last[window[:, 0]])

    steps = max(EPOCHS * windows * rows // STEP_TOKENS, 1)
    descend(
        weights, loss, steps, rate=LEARNING_RATE,
        report=lambda done, of: report(done * STEP_TOKENS, of * STEP_TOKENS),
    )  # fmt: skip
    found = {name: part.detach().numpy() for name, part in vars(gate).items()}
    for name in ("query", "key", "value", "inner"):
        found[name], found[name + "_bias"] = unscaled(found[name], found[name + "_bias"], x_mean, x_spread)
    return Gate(
        **found
        | {"outer": found["outer"] * y_spread[:, None], "outer_bias": found["outer_bias"] * y_spread + y_mean}
    )


def _last_that_stays(y: Floats) -> Floats:
    """[windows, 1, K]: the label that the best eighth of a window is above."""
    cut: Floats = np.quantile(y, 1 - 1 / BEST, axis=1, keepdims=True).astype(np.float32)
    return cut


def loss_of(torch: Tensor, scores: Tensor, labels: Tensor, last: Tensor) -> Tensor:
    """Of scores and labels [chunks, T, K]; ``last`` [chunks, 1, K]: the label that those which stay are above."""
    bend, stays = torch.nn.functional, (labels > last).float()
    flagged = bend.binary_cross_entropy_with_logits((scores - last) * FLAG_SLOPE, stays)
    return bend.smooth_l1_loss(scores, labels) + FLAG_SHARE * flagged


def held_out_figures(x: Floats, y: Floats, gate: Gate) -> Floats:
    """`figures` of a gate of arrays on windows that it has not seen, read in chunks."""
    torch = require_torch()
    tensors = Gate(**{name: torch.from_numpy(part) for name, part in vars(gate).items()})
    with torch.inference_mode():
        chunks = torch.from_numpy(x).split(MEASURED_CHUNK, dim=1)
        scores = torch.cat([tensors.scores(chunk) for chunk in chunks], dim=1)
        loss = float(loss_of(torch, scores, torch.from_numpy(y), torch.from_numpy(_last_that_stays(y))))
    return figures(loss, scores.numpy(), y)
