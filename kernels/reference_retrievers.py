"""Slow and obvious NumPy twin of the retrievers' digests: what each must say of a page of 256 tokens.

As in ``reference.py`` all arithmetic is float64; codes are rounded as the native ones are. The letters are the same.
"In the frame of a page" means rotated (RoPE) by the distance from the page's first token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .reference import Floats, Integers, apply_rope

MEAN, MIN_MAX, CHANNELS, CLUSTER = 1, 2, 3, 4
BLOCKS, TOKENS = 16, 16
PAGE = BLOCKS * TOKENS


@dataclass(frozen=True)
class Rotation:
    """RoPE of one layer: ``frequencies`` [R/2] and the attention factor."""

    frequencies: Floats
    factor: float = 1.0

    def turn(self, x: ArrayLike, positions: ArrayLike) -> Floats:
        """``x`` [T, D] at ``positions`` [T]."""
        return apply_rope(np.asarray(x)[:, None], positions, self.frequencies, self.factor)[:, 0]

    def back(self, x: ArrayLike, position: int) -> Floats:
        """``x`` [T, D] turned back by one position, without the factor."""
        turned = apply_rope(np.asarray(x)[:, None], np.array([-position]), self.frequencies)
        return turned[:, 0]


@dataclass(frozen=True)
class Basis:
    """What the digests of one KV head share: ``center`` [16 blocks, D], and the chosen ``channels``."""

    center: Floats
    channels: Integers


def make_basis(
    digest: int, rotation: Rotation, keys: ArrayLike, pairs: int = 8, query_energy: ArrayLike | None = None
) -> Basis:
    """From ``keys`` [T, D] before RoPE and, if at hand, the mean squares [D] of queries before RoPE."""
    sample = np.asarray(keys, np.float64)
    size, half = sample.shape[1], rotation.frequencies.size
    everywhere = rotation.turn(np.broadcast_to(sample.mean(axis=0), (PAGE, size)), np.arange(PAGE))
    center = everywhere.reshape(BLOCKS, TOKENS, size).mean(axis=1)
    if digest == CLUSTER:
        center = np.broadcast_to(center.mean(axis=0), center.shape)
    partners = [(i, i + half) if i < half else (2 * i, 2 * i + 1) for i in range(size // 2)]
    weight = np.ones(size) if query_energy is None else np.asarray(query_energy, np.float64)
    energy = [sample[:, pair].var(axis=0).sum() * weight[list(pair)].sum() for pair in map(list, partners)]
    best = np.sort(np.argsort(energy)[::-1][:pairs])
    return Basis(center, np.array([d for i in best for d in partners[i]], np.int64))


def page_logits(digest: int, basis: Basis, framed: ArrayLike, queries: ArrayLike) -> Floats:
    """What ``queries`` [R, D] are promised by the blocks of a page [R, 16]; ``framed`` [16 blocks, 16 tokens, D].

    Both are in the frame of the page, queries with the scale of attention.
    """
    keys, q = np.asarray(framed, np.float64), np.asarray(queries, np.float64)
    return {MEAN: _means, MIN_MAX: _bounds, CHANNELS: _channels, CLUSTER: _clusters}[digest](basis, keys, q)


def _means(basis: Basis, keys: Floats, q: Floats) -> Floats:
    rest = keys.mean(axis=1) - basis.center
    scale = np.abs(rest).max(axis=1, keepdims=True) / 127
    logits: Floats = q @ (np.rint(rest / scale) * scale + basis.center).T
    return logits


def _bounds(basis: Basis, keys: Floats, q: Floats) -> Floats:
    least, most = keys.min(axis=1) - basis.center, keys.max(axis=1) - basis.center
    offset = least.min(axis=1, keepdims=True)
    scale = (most.max(axis=1, keepdims=True) - offset) / 255
    least = np.floor((least - offset) / scale) * scale + offset + basis.center
    most = np.ceil((most - offset) / scale) * scale + offset + basis.center
    logits: Floats = np.stack([np.maximum(row * least, row * most).sum(axis=1) for row in q])
    return logits


def _channels(basis: Basis, keys: Floats, q: Floats) -> Floats:
    rest = (keys - basis.center[:, None])[..., basis.channels]
    scale = (np.abs(rest).max(axis=-1, keepdims=True) / 7).astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint(rest / scale), -7, 7)
    tokens = np.einsum("rc,btc->rbt", q[:, basis.channels], codes * scale)
    logits: Floats = q @ basis.center.T + np.log(np.exp(tokens).mean(axis=-1))
    return logits


def _clusters(basis: Basis, keys: Floats, q: Floats) -> Floats:
    rest = keys.mean(axis=1) - basis.center
    least, most = rest.min(axis=0), rest.max(axis=0)
    offset, scale = (x.astype(np.float16).astype(np.float64) for x in ((least + most) / 2, (most - least) / 254))
    codes = np.clip(np.rint((rest - offset) / scale), -127, 127)
    logits: Floats = q @ (codes * scale + offset + basis.center).T
    return logits


def votes(logits: ArrayLike, hot_log_sums: ArrayLike) -> Floats:
    """What the blocks get of the rows' softmax [blocks], summed over rows, if each of a block's tokens had its logit.

    ``logits`` are [R, blocks]; ``hot_log_sums`` [R] are the logs of the hot tokens' sums of exponentials.
    """
    rows, hot = np.asarray(logits, np.float64), np.asarray(hot_log_sums, np.float64)
    peak = np.maximum(rows.max(axis=1), hot)[:, None]
    parts = TOKENS * np.exp(rows - peak)
    shares: Floats = parts / (parts.sum(axis=1, keepdims=True) + np.exp(hot[:, None] - peak))
    total: Floats = shares.sum(axis=0)
    return total


def spherical_loss(framed: ArrayLike) -> float:
    """How far the keys of a page [16 blocks, 16 tokens, D] point away from their blocks' mean direction."""
    keys = np.asarray(framed, np.float64)
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    mean = unit.mean(axis=1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    return float(PAGE - np.einsum("btd,bd->", unit, mean))
