"""CSKV (arXiv 2409.10593): which few coefficients tell most of a head's keys and values, in closed form.

The paper starts from an activation-aware SVD of the key and value projections and trains the two factors to reconstruct
each layer's keys and values. Keys and values are linear in what the layer reads, so the best factors of a rank under
that loss are known: the leading principal components of the keys and values themselves (reduced-rank regression of a
variable on what determines it). Here the components are taken in the measure of what attention does with the error:

* a key's error e costs (q . R e)^2, averaged over queries and over the rotations R that distances bring;
* a value's error e costs |W_o e|^2, summed over the query heads that read it.

A key and its value are projected together: they are made of the same input and say much of each other. Each measure is
divided by the spread in it, and keys count `KEY_WEIGHT` times as much as values. Spread is within blocks: the archive
keeps of each block the mean of what coefficients leave out.

Departures from the paper: closed form instead of training; in these measures; one basis for keys and values, and for
each KV head, as heads recall different blocks; each block has its own mean of what coefficients leave out.
"""

from __future__ import annotations

import contextlib
import json
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...devices.files.safe_write import temporary_file
from ...devices.machine import peak_rss_bytes
from ...devices.reporting import Progress, no_progress
from ...kernels import BLOCK_TOKENS
from ..package import Package
from ..rope import rope_frequencies
from ..spec import ModelSpec, RopeSpec
from .decoder import Decoder, LayerActivations, Observer, Tensor, require_torch
from .files import calibration_folder, package_mark
from .lowrank import Projections, write_lowrank
from .text import Order, Text, Window, cut_windows, held_out

METHOD = "cskv"
FIRST_TOKENS = 16  # of a window, not learnt from: sinks, which the archive keeps whole
DISTANCES = np.geomspace(64, 8192, 48)  # from a query to what is archived: beyond the window, as far as texts are long
LEAST_SHARE = 1e-6  # of a measure's largest direction: smaller ones count as much as this
KEY_WEIGHT = 3.0  # of 2, 3, 4 and 6 the least error of what attention gives (docs/lab-notes.md)
REPORTED_PERCENT = (50, 20)
SUMS_FILE = "cskv.partial.npz"

Doubles = npt.NDArray[np.float64]


class Moments:
    """Sums over tokens for L layers, K KV heads: products by channel of pairs (a key with its value, less the mean of
    their block), and of queries."""

    def __init__(self, layers: int, kv_heads: int, head_size: int) -> None:
        self.count = np.zeros(layers)
        self.pairs_squared = np.zeros((layers, kv_heads, 2 * head_size, 2 * head_size))
        self.queries_squared = np.zeros((layers, kv_heads, head_size, head_size))

    def add(self, layer: int, keys: Doubles, values: Doubles, queries: Doubles) -> None:
        """``keys``, ``values`` [T, K, D] and ``queries`` [T, H, D], all before RoPE."""
        whole = len(keys) // BLOCK_TOKENS * BLOCK_TOKENS
        pairs = np.concatenate([keys, values], axis=-1)[:whole]
        blocks = pairs.reshape(-1, BLOCK_TOKENS, *pairs.shape[1:])
        self.count[layer] += whole
        self.pairs_squared[layer] += _products((blocks - blocks.mean(axis=1, keepdims=True)).reshape(pairs.shape))
        tokens, kv_heads, size = keys.shape
        shared = queries.reshape(tokens, kv_heads, -1, size).swapaxes(1, 2).reshape(-1, kv_heads, size)
        self.queries_squared[layer] += _products(shared)

    def covariance(self, layer: int) -> Doubles:
        """[K, 2D, 2D]."""
        found: Doubles = self.pairs_squared[layer] / max(float(self.count[layer]), 1.0)
        return found


class _Watch(Observer):
    """Adds a window's tokens to moments, and keeps what the output projections make of values."""

    def __init__(self, window: Window, moments: Moments, outputs: Doubles) -> None:
        self._window, self._moments, self._outputs = window, moments, outputs

    def enter(self, activations: LayerActivations, /) -> None:
        at = slice(self._window.first + FIRST_TOKENS, self._window.end)
        parts = (activations.keys, activations.values, activations.queries)
        keys, values, queries = (part[at].double().numpy() for part in parts)
        self._moments.add(activations.layer, keys, values, queries)
        kv_heads, size = keys.shape[1:]
        weight = activations.output_weight.double().numpy()
        by_head = weight.T.reshape(kv_heads, -1, size, weight.shape[0])  # [K, G, D, hidden]
        self._outputs[activations.layer] = np.einsum("kgih,kgjh->kij", by_head, by_head, optimize=True)

    def attended(self, head: int, first: int, weights: Tensor, /) -> None: ...


class _Sums:
    """What is kept between windows, and its file. Files of another order, or damaged ones, are passed over."""

    def __init__(self, path: Path, key: str, spec: ModelSpec) -> None:
        self._path, self._key = path, key
        sizes = spec.layers, spec.kv_heads, spec.head_size
        self.windows, self.seconds = 0, 0.0
        self.learnt, self.tested = Moments(*sizes), Moments(*sizes)
        self.outputs = np.zeros((*sizes, spec.head_size))
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            self._load()

    def _arrays(self) -> dict[str, Doubles]:
        parts = {"learnt": self.learnt, "tested": self.tested}
        found = {f"{part}.{name}": array for part, sums in parts.items() for name, array in vars(sums).items()}
        return {**found, "outputs": self.outputs}

    def _load(self) -> None:
        arrays = self._arrays()
        with self._path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            if str(saved["key"]) != self._key:
                return
            found = {name: saved[name] for name in arrays}
            windows, seconds = int(saved["windows"]), float(saved["seconds"])
        if any(found[name].shape != array.shape for name, array in arrays.items()):
            return
        for name, array in arrays.items():
            array[:] = found[name]
        self.windows, self.seconds = windows, seconds

    def save(self, seconds: float) -> None:
        """Raises StorageError."""
        arrays: dict[str, Any] = dict(self._arrays())
        with temporary_file(self._path, bytes_needed=sum(array.nbytes for array in arrays.values())) as file:
            np.savez(file, key=np.array(self._key), windows=self.windows, seconds=self.seconds + seconds, **arrays)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()


def calibrate_cskv(
    package: Package, text: Text, order: Order, *, threads: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Finds the projections, writes them into the package, and returns their record (docs/calibration.md has its keys).

    ``progress`` counts tokens of the text; the order's target means nothing here. Stopped between or within windows,
    the same call goes on after the last whole window.

    Raises:
        OptionError: torch is not installed, or the text is too short.
        ModelError: the model has experts.
        StorageError: the package's folder cannot be written.
    """
    torch = require_torch()
    order = replace(order, target="later")  # each window is read once
    windows = cut_windows(text, order)
    decoder, spec = Decoder(package), package.spec
    learnt = len(windows) - held_out(len(windows))
    key = json.dumps([METHOD, package_mark(package), text.sha256, asdict(order), len(windows)])
    sums = _Sums(calibration_folder(package) / SUMS_FILE, key, spec)
    report, size, begun = progress or no_progress, order.window_tokens, time.perf_counter()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        while sums.windows < len(windows):
            window = windows[sums.windows]
            moments = sums.learnt if sums.windows < learnt else sums.tested
            decoder.run(window.ids, _Watch(window, moments, sums.outputs), whole=False)
            sums.windows += 1
            sums.save(time.perf_counter() - begun)
            report("calibrating", sums.windows * size, len(windows) * size)
    finally:
        torch.set_num_threads(threads_before)
    measures = _measures(spec, sums)
    found = _projections(sums.learnt, measures)
    errors = {
        f"{side}_error_of_{percent}": _errors(sums.tested, measure, found, percent, at)
        for at, (side, measure) in enumerate(measures.items())
        for percent in REPORTED_PERCENT
    }
    seconds = sums.seconds + time.perf_counter() - begun
    figures = _figures(text, order, len(windows), seconds) | {
        name: round(float(values.mean()), 4) for name, values in errors.items()
    } | {f"{name}_of_layer": values.round(4).tolist() for name, values in errors.items()}  # fmt: skip
    record = write_lowrank(package, METHOD, found, figures)
    sums.remove()
    return record


def best_projection(covariance: Doubles, measure: Doubles) -> tuple[Doubles, Doubles]:
    """Encoder [D, D] and decoder [D, D] whose first r coefficients err least in ``measure``, for every r.

    Of x with ``covariance`` C: the error x - x' costs (x - x')' M (x - x'), so the coefficients are the principal
    components of M^1/2 x. An error of a coefficient costs its square.
    """
    values, vectors = np.linalg.eigh(measure)
    if not values[-1] > 0:  # nobody looks at this head: all directions alike
        values, vectors = np.ones(len(values)), np.eye(len(values))
    lengths = np.sqrt(np.maximum(values, values[-1] * LEAST_SHARE))
    root, inverse = (vectors * lengths) @ vectors.T, (vectors / lengths) @ vectors.T
    components = np.linalg.eigh(root @ covariance @ root)[1][:, ::-1]
    return root @ components, components.T @ inverse


def turned(measure: Doubles, rope: RopeSpec | None) -> Doubles:
    """The mean of R M R' over `DISTANCES`: queries before RoPE have the products ``measure`` [K, D, D], and meet keys
    turned by the distance from them."""
    if rope is None:
        return measure
    half, size = rope.dims // 2, measure.shape[-1]
    found, pairs = np.zeros_like(measure), np.arange(half)
    for distance in DISTANCES:
        angles = distance * rope_frequencies(rope).astype(np.float64)
        turn = np.eye(size)
        turn[pairs, pairs] = turn[pairs + half, pairs + half] = np.cos(angles)
        turn[pairs, pairs + half], turn[pairs + half, pairs] = -np.sin(angles), np.sin(angles)
        found += turn @ measure @ turn.T / len(DISTANCES)
    return found


def _products(x: Doubles) -> Doubles:
    """[K, D, D] of x [T, K, D]."""
    by_head = x.swapaxes(0, 1)
    found: Doubles = by_head.swapaxes(1, 2) @ by_head
    return found


def _measures(spec: ModelSpec, sums: _Sums) -> dict[str, Doubles]:
    """[L, K, D, D] of each side."""
    queries = sums.learnt.queries_squared
    return {
        "key": np.stack([turned(queries[layer], spec.layer_rope(layer)) for layer in range(spec.layers)]),
        "value": sums.outputs,
    }


def pair_measure(covariance: Doubles, key_measure: Doubles, value_measure: Doubles) -> Doubles:
    """[2D, 2D] of a key [D] and its value, whose pairs have ``covariance``: of either the share of its spread."""
    size = len(key_measure)
    found = np.zeros_like(covariance)
    sides = ((slice(0, size), key_measure, KEY_WEIGHT), (slice(size, None), value_measure, 1.0))
    for at, measure, weight in sides:
        spread = float((measure * covariance[at, at]).sum())
        found[at, at] = measure * (weight / spread if spread > 0 else 0.0)
    return found


def _projections(moments: Moments, measures: dict[str, Doubles]) -> Projections:
    encoders, decoders = np.zeros_like(moments.pairs_squared), np.zeros_like(moments.pairs_squared)
    for layer in range(len(encoders)):
        for head, covariance in enumerate(moments.covariance(layer)):
            measure = pair_measure(covariance, measures["key"][layer, head], measures["value"][layer, head])
            encoders[layer, head], decoders[layer, head] = best_projection(covariance, measure)
    return Projections(encoders.astype(np.float32), decoders.astype(np.float32))


def _errors(moments: Moments, measure: Doubles, by: Projections, percent: int, side: int) -> Doubles:
    """[L]: the error of keys (``side`` 0) or values (1) in the measure, over the spread in it (square roots both), both
    within blocks, of tokens that were not learnt from."""
    size = measure.shape[-1]
    rank, at = max(1, round(2 * size * percent / 100)), slice(side * size, (side + 1) * size)
    rest = np.eye(2 * size) - by.encoders[..., :rank].astype(np.float64) @ by.decoders[:, :, :rank]
    found = []
    for layer in range(len(measure)):
        covariance = moments.covariance(layer)
        left = rest[layer].swapaxes(1, 2) @ covariance @ rest[layer]
        error, spread = ((part[:, at, at] * measure[layer]).sum() for part in (left, covariance))
        found.append(np.sqrt(max(error, 0.0) / max(spread, 1e-300)))
    return np.array(found)


def _figures(text: Text, order: Order, windows: int, seconds: float) -> dict[str, Any]:
    tested = held_out(windows)
    return {
        "paper": "CSKV, arXiv 2409.10593",
        "window_tokens": order.window_tokens,
        "seed": order.seed,
        "tokens": (windows - tested) * order.window_tokens,
        "held_out_tokens": tested * order.window_tokens,
        "text_tokens": len(text.ids),
        "text_sha256": text.sha256,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
    }
