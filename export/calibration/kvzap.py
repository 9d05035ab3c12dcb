"""KVzap's linear heads (arXiv 2601.07891): what a pair will be worth, told from what its layer's attention reads.

Ridge regression per layer, in closed form, over windows of a text. Sums are all that is kept, so memory does not grow
with the text; they are written after each window, so that the same call goes on where it was stopped. The windows that
the seed puts last are not learnt from: they say how well the heads predict (R squared), and which strength of the ridge
does best, one for the whole model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...devices.files.safe_write import temporary_file
from ...devices.machine import peak_rss_bytes
from ...devices.reporting import Progress, no_progress
from ...errors import OptionError
from ..package import Package
from .decoder import Decoder, Tensor, require_torch
from .files import calibration_folder, package_mark, write_retention
from .labels import TARGETS, Labels, Window
from .ridge import RIDGES, Doubles, FitSums, RidgeSums

METHOD = "kvzap"
WINDOW_TOKENS = 1024  # the paper's texts have 750 to 1,250: attention thins out with length, and labels with it
LEAST_WINDOW, MOST_WINDOW = 16, 1 << 16
FIRST_TOKENS = 4  # of a window, not learnt from: attention sinks, which the cache keeps whatever their score
HELD_OUT = 8  # one window of so many, at least one
SUMS_FILE = "kvzap.partial.npz"

Heads = list[tuple[Doubles, Doubles]]  # weights and biases for each strength of the ridge


@dataclass(frozen=True)
class Text:
    """Token ids: of the text; of what a conversation has before it; and of the request to repeat it."""

    ids: tuple[int, ...]
    before: tuple[int, ...] = ()
    request: tuple[int, ...] = ()

    @property
    def sha256(self) -> str:
        """Of all ids, in hex digits."""
        parts = [np.asarray(ids, "<i8").tobytes() for ids in (self.ids, self.before, self.request)]
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()


@dataclass(frozen=True)
class Order:
    """What is wanted. ``tokens``: at most so many of the text, in windows all over it; None: all."""

    window_tokens: int = WINDOW_TOKENS
    tokens: int | None = None
    target: str = TARGETS[0]
    seed: int = 0

    def __post_init__(self) -> None:
        if not LEAST_WINDOW <= self.window_tokens <= MOST_WINDOW:
            raise OptionError(f"window is {self.window_tokens} tokens; give {LEAST_WINDOW} to {MOST_WINDOW}")
        if self.tokens is not None and self.tokens < 2 * self.window_tokens:
            raise OptionError(
                f"{self.tokens} tokens are less than two windows of {self.window_tokens}; give more, or smaller windows"
            )
        if self.target not in TARGETS:
            raise OptionError(f"target {self.target!r} is not known; choose {' or '.join(TARGETS)}")
        if self.seed < 0:
            raise OptionError(f"seed is {self.seed}; give 0 or more")


def cut_windows(text: Text, order: Order) -> list[Window]:
    """The windows in the order that they are read in: those that are learnt from, then those held out.

    Raises:
        OptionError: the text is shorter than two windows.
    """
    size = order.window_tokens
    count = len(text.ids) // size
    if count < 2:
        raise OptionError(
            f"the text has {len(text.ids):,} tokens, calibrating needs two windows of {size:,} or more; give more "
            "text, or a smaller window"
        )
    places = np.random.default_rng(order.seed).permutation(count)
    if order.tokens is not None:
        places = places[: order.tokens // size]
    first = len(text.before)
    windows = []
    for place in places:
        piece = text.ids[place * size : (place + 1) * size]
        ids, repeated = (*text.before, *piece), None
        if order.target == "repeat":
            ids, repeated = (*ids, *text.request, *piece), first + size + len(text.request)
        windows.append(Window(ids, first, first + size, repeated))
    return windows


def held_out(windows: int) -> int:
    """How many of them."""
    return max(1, windows // HELD_OUT)


class _Sums:
    """All that is kept between windows, and its file. Files of another order, or damaged ones, are passed over."""

    def __init__(self, path: Path, key: str, spec_sizes: tuple[int, int, int]) -> None:
        layers, hidden, kv_heads = spec_sizes
        self._path, self._key = path, key
        self.windows, self.seconds = 0, 0.0
        self.fitted = RidgeSums(layers, hidden, kv_heads)
        self.checked = FitSums(len(RIDGES), layers, kv_heads)
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            self._load()

    def _arrays(self) -> dict[str, Any]:
        return {**vars(self.fitted), **vars(self.checked)}

    def _load(self) -> None:
        with self._path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            if str(saved["key"]) != self._key:
                return
            found = {name: saved[name] for name in self._arrays()}
            windows, seconds = int(saved["windows"]), float(saved["seconds"])
        if any(found[name].shape != array.shape for name, array in self._arrays().items()):
            return
        for name, array in self._arrays().items():
            array[:] = found[name]
        self.windows, self.seconds = windows, seconds

    def heads(self) -> Heads:
        """For each strength of the ridge."""
        return [self.fitted.solve(ridge) for ridge in RIDGES]

    def save(self, seconds: float) -> None:
        """Raises StorageError."""
        arrays = self._arrays()
        with temporary_file(self._path, bytes_needed=sum(array.nbytes for array in arrays.values())) as file:
            np.savez(file, key=np.array(self._key), windows=self.windows, seconds=self.seconds + seconds, **arrays)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()


def calibrate_kvzap(
    package: Package, text: Text, order: Order, *, threads: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Fits the heads, writes them into the package, and returns their record (docs/calibration.md has its keys).

    ``progress`` counts tokens of the text. Stopped between or within windows, the same call goes on after the last
    whole window.

    Raises:
        OptionError: torch is not installed, or the text is too short.
        ModelError: the model has experts.
        StorageError: the package's folder cannot be written.
    """
    torch = require_torch()
    windows = cut_windows(text, order)
    decoder, spec = Decoder(package), package.spec
    learnt = len(windows) - held_out(len(windows))
    key = json.dumps([package_mark(package), text.sha256, asdict(order), len(windows)])
    sums = _Sums(calibration_folder(package) / SUMS_FILE, key, (spec.layers, spec.hidden, spec.kv_heads))
    report, size, begun = progress or no_progress, order.window_tokens, time.perf_counter()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        heads = sums.heads() if sums.windows >= learnt else []
        while sums.windows < len(windows):
            at = sums.windows

            def take(layer: int, inputs: Tensor, labels: Tensor, at: int = at, heads: Heads = heads) -> None:
                x, y = (part[FIRST_TOKENS:].double().numpy() for part in (inputs, labels))
                if at < learnt:
                    sums.fitted.add(layer, x, y)
                else:
                    sums.checked.add(layer, y, [x @ weights[layer].T + biases[layer] for weights, biases in heads])
                report("calibrating", at * size + (layer + 1) * size // spec.layers, len(windows) * size)

            labels = Labels(windows[at], spec.attention_windows, take)
            decoder.run(windows[at].ids, labels, whole=False)
            labels.finish()
            sums.windows += 1
            sums.save(time.perf_counter() - begun)
            if sums.windows == learnt:
                heads = sums.heads()
    finally:
        torch.set_num_threads(threads_before)
    r2 = sums.checked.r2()
    best = int(r2.mean(axis=1).argmax())
    weights, biases = (part.astype(np.float32) for part in heads[best])
    seconds = sums.seconds + time.perf_counter() - begun
    figures = _figures(text, order, len(windows), r2[best].tolist(), seconds) | {
        "ridge": RIDGES[best],
        "r2_of_ridge": dict(zip(map(str, RIDGES), r2.mean(axis=1).round(4).tolist(), strict=True)),
    }
    record = write_retention(package, METHOD, weights, biases, figures)
    sums.remove()
    return record


def _figures(text: Text, order: Order, windows: int, r2: Sequence[float], seconds: float) -> dict[str, Any]:
    tested = held_out(windows)
    return {
        "paper": "KVzap, arXiv 2601.07891",
        **asdict(order),
        "tokens": (windows - tested) * order.window_tokens,
        "held_out_tokens": tested * order.window_tokens,
        "text_tokens": len(text.ids),
        "text_sha256": text.sha256,
        "r2": round(float(np.mean(r2)), 4),
        "r2_of_layer": [round(value, 4) for value in r2],
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
    }
