"""Heads that are trained: the text is read once into a sample on disk, then one layer after the other learns from it.

The model is frozen and its layers know nothing of each other, so memory is that of one layer. Sample and heads are
kept, window by window and layer by layer, so that the same call goes on where it was stopped. A method is a `Recipe`.
"""

from __future__ import annotations

import contextlib
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...devices.files.safe_write import temporary_file
from ...devices.machine import peak_rss_bytes
from ...devices.reporting import Progress, no_progress
from ..package import Package
from ..spec import ModelSpec
from .decoder import Decoder, Tensor, torch_threads
from .descent import FIGURES
from .files import Floats, calibration_folder, package_mark, write_calibration
from .labels import Labels
from .sample import Sample
from .text import Order, Text, Window, cut_windows, held_out

STATE_FILE, SAMPLE_FILE = "{}.partial.npz", "{}.sample"


class Train(Protocol):
    """The head of one layer, a dataclass of arrays, for features ``x`` [windows, rows, F] and labels ``y`` [windows,
    rows, K]; ``report(done, total)`` counts the tokens that steps see."""

    def __call__(self, x: Floats, y: Floats, /, *, seed: int, report: Callable[[int, int], object]) -> Any: ...


@dataclass(frozen=True)
class Recipe:
    """What a method trains, and how. ``features``: how many numbers ``labels`` hands over of a token. ``measure(x, y,
    head)``: `FIGURES` of a head on windows that it has not seen. ``settings``: what else decides the result."""

    method: str
    paper: str
    labels: type[Labels]
    features: Callable[[ModelSpec], int]
    train: Train
    measure: Callable[[Floats, Floats, Any], Floats]
    settings: Sequence[object]


@dataclass
class _State:
    """How far a run has come, and its file. One of another order, or a damaged one, is passed over."""

    path: Path
    key: str
    windows: int = 0
    seconds: float = 0.0
    figures: Floats = field(default_factory=lambda: np.zeros((0, len(FIGURES)), np.float32))
    """Of each layer that has been trained."""
    tensors: dict[str, Floats] = field(default_factory=dict)
    """Of these layers, as the package will have them."""

    def load(self) -> None:
        with (
            contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
            self.path.open("rb") as file,
            np.load(file, allow_pickle=False) as saved,
        ):
            if str(saved["key"]) == self.key:
                found = {name: saved[name] for name in saved.files}
                self.windows, self.seconds = int(found.pop("windows")), float(found.pop("seconds"))
                self.figures, self.tensors = found.pop("figures"), found
                del found["key"]

    def save(self, seconds: float) -> None:
        """Raises StorageError."""
        with temporary_file(self.path, bytes_needed=sum(array.nbytes for array in self.tensors.values())) as file:
            own = {"windows": self.windows, "seconds": self.seconds + seconds, "figures": self.figures}
            np.savez(file, key=np.array(self.key), **own, **self.tensors)  # type: ignore[arg-type]

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()


def calibrate_trained(
    recipe: Recipe, package: Package, text: Text, order: Order, *, threads: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Trains the heads, writes them into the package, and returns their record (docs/calibration.md has its keys).

    ``progress``: ``calibrating`` counts tokens of the text, ``training`` those that the steps of all layers see.

    Raises:
        OptionError: torch is not installed, or the text is too short.
        ModelError: the model has experts.
        StorageError: the package's folder cannot be written.
    """
    windows = cut_windows(text, order)
    decoder, spec, folder = Decoder(package), package.spec, calibration_folder(package)
    sample = Sample(
        folder / SAMPLE_FILE.format(recipe.method), spec.layers, len(windows), order.window_tokens,
        recipe.features(spec), spec.kv_heads,
    )  # fmt: skip
    key = json.dumps([package_mark(package), text.sha256, asdict(order), len(windows), recipe.settings, FIGURES])
    state, begun = _State(folder / STATE_FILE.format(recipe.method), key), time.perf_counter()
    if sample.kept:
        state.load()
    if not state.windows:
        state.remove()  # another one's, which would vouch for what is written over now
    report = progress or no_progress
    with contextlib.closing(sample), torch_threads(threads):
        for at in range(state.windows, len(windows)):
            _read(recipe, decoder, windows[at], at, sample, report)
            state.windows = at + 1
            state.save(time.perf_counter() - begun)
        for layer in range(len(state.figures), spec.layers):
            _train(recipe, layer, sample, state, order.seed, report)
            state.save(time.perf_counter() - begun)
    figures = _figures(recipe, text, order, sample, state, time.perf_counter() - begun)
    record = write_calibration(package, recipe.method, state.tensors, figures)
    state.remove()
    sample.remove()
    return record


def _read(recipe: Recipe, decoder: Decoder, window: Window, at: int, sample: Sample, report: Progress) -> None:
    """One window of the text into the sample."""
    size, layers = window.end - window.first, decoder.spec.layers

    def take(layer: int, features: Tensor, labels: Tensor) -> None:
        sample.write(layer, at, features.numpy(), labels.numpy())
        report("calibrating", at * size + (layer + 1) * size // layers, sample.windows * size)

    labels = recipe.labels(window, decoder.spec.attention_windows, take)
    decoder.run(window.ids, labels, whole=False)
    labels.finish()
    sample.flush()


def _train(recipe: Recipe, layer: int, sample: Sample, state: _State, seed: int, report: Progress) -> None:
    """The head of one layer, and what it is worth on the windows that are held out."""
    layers, learnt = sample.layers, sample.windows - held_out(sample.windows)
    head = recipe.train(
        *sample.read(layer, range(learnt)), seed=seed * layers + layer,
        report=lambda done, total: report("training", layer * total + done, layers * total),
    )  # fmt: skip
    found = recipe.measure(*sample.read(layer, range(learnt, sample.windows)), head)
    state.figures = np.concatenate([state.figures, found[None]])
    state.tensors |= {f"layers.{layer}.retention.{name}": values for name, values in vars(head).items()}


def _figures(
    recipe: Recipe, text: Text, order: Order, sample: Sample, state: _State, seconds: float
) -> dict[str, Any]:
    tested, size = held_out(sample.windows), order.window_tokens
    means = dict(zip(FIGURES, state.figures.astype(float).mean(axis=0).round(4).tolist(), strict=True))
    return {
        "paper": recipe.paper,
        **asdict(order),
        "tokens": (sample.windows - tested) * size,
        "held_out_tokens": tested * size,
        "sampled_of_window": sample.rows,
        "text_tokens": len(text.ids),
        "text_sha256": text.sha256,
        **means,
        "r2_of_layer": state.figures[:, FIGURES.index("r2")].astype(float).round(4).tolist(),
        "seconds": round(state.seconds + seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
    }
