"""Ridge regression from sums: X'X and X'y are added up window by window, and nothing else is kept of the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
# Shares of each feature's own spread that may be added to it: inputs of a layer differ in scale by orders of magnitude,
# and an equal amount for all would silence the small ones. The less text, the larger the share that predicts best.
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


class RidgeSums:
    """Sums over samples, for L layers with F features and K targets each."""

    def __init__(self, layers: int, features: int, targets: int) -> None:
        self.gram = np.zeros((layers, features + 1, features + 1))  # the last feature is 1
        self.cross = np.zeros((layers, features + 1, targets))

    def add(self, layer: int, x: Doubles, y: Doubles) -> None:
        """``x`` [n, F] and ``y`` [n, K]."""
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        self.gram[layer] += x.T @ x
        self.cross[layer] += x.T @ y

    def solve(self, ridge: float) -> tuple[Doubles, Doubles]:
        """Weights [L, K, F] and biases [L, K] of y = x W' + b; the bias is not shrunk."""
        found = [self._solve_layer(layer, ridge) for layer in range(len(self.gram))]
        return np.stack([weights for weights, _ in found]), np.stack([biases for _, biases in found])

    def _solve_layer(self, layer: int, ridge: float) -> tuple[Doubles, Doubles]:
        gram, cross = self.gram[layer], self.cross[layer]
        count = gram[-1, -1]
        x_mean, y_mean = gram[-1, :-1] / count, cross[-1] / count
        spread = gram[:-1, :-1] - count * np.outer(x_mean, x_mean)
        together = cross[:-1] - count * np.outer(x_mean, y_mean)
        own, raw = spread.diagonal(), gram.diagonal()[:-1]
        still = own <= 1e-12 * raw  # a feature that never moves has only rounding errors
        added = np.where(still, np.maximum(raw, 1), ridge * own)
        weights = np.linalg.solve(spread + np.diag(added), together)
        return weights.T, y_mean - x_mean @ weights


class FitSums:
    """How well several predictors fit samples that they have not seen, for L layers with K targets each."""

    def __init__(self, predictors: int, layers: int, targets: int) -> None:
        self.count = np.zeros((layers, 1))
        self.total = np.zeros((layers, targets))
        self.squares = np.zeros((layers, targets))
        self.errors = np.zeros((predictors, layers, targets))

    def add(self, layer: int, y: Doubles, predicted: Sequence[Doubles]) -> None:
        """``y`` [n, K], and as many for each predictor."""
        self.count[layer] += len(y)
        self.total[layer] += y.sum(axis=0)
        self.squares[layer] += np.square(y).sum(axis=0)
        for errors, guess in zip(self.errors, predicted, strict=True):
            errors[layer] += np.square(y - guess).sum(axis=0)

    def r2(self) -> Doubles:
        """Share of the spread that each predictor explains, of each layer over its targets, [predictors, L]; below 0:
        worse than the mean."""
        spread = self.squares - np.square(self.total) / np.maximum(self.count, 1)
        explained: Doubles = 1 - self.errors.sum(axis=2) / np.maximum(spread.sum(axis=1), 1e-30)
        return explained
