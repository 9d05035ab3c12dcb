"""DuoAttention's gates (arXiv 2410.10819): which KV heads a model answers from, found by descent on planted passkeys.

A gate of each KV head says how much of its queries' attention is full, and how much is to sinks and a window only. The
model is frozen. Texts hide passkeys that are asked for at the end; gates are trained so that the answers' last hidden
states stay what they are with full attention, while each gate's size is charged. What sinks to nothing may stream.

Gradients go through one layer at a time: a pass without them keeps what each layer reads, then each layer runs again
from the last to the first. So memory is that of one layer and of the residual streams.

Departures from the paper: the distance is relative to the length of the hidden states, so that one charge does for all
models; short texts, sinks and windows; few steps, at a larger rate, and a head's score is the mean of its gate over
all of them, which also ranks heads whose gates have closed (`docs/calibration.md` has the figures).
"""

from __future__ import annotations

import contextlib
import json
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...devices.files.safe_write import temporary_file
from ...devices.machine import peak_rss_bytes
from ...devices.reporting import Progress, no_progress
from ...errors import ModelError
from ..package import Package
from .decoder import Decoder, Gates, Tensor, require_torch, torch_threads
from .files import calibration_folder, package_mark
from .head_scores import write_head_scores
from .text import Order, Passkeys, Text, Window, cut_windows, held_out

METHOD = "duo"
STATE_FILE = "duo.partial.npz"
STEPS = 24  # of one text each; the paper has 2,000
RATE = 0.1  # of Adam; the paper's rises to 0.02 and falls again, here the mean over the steps does for that
CHARGE = 0.05  # of the mean gate, as in the paper
MOMENTS = (0.9, 0.95)  # how much of the mean gradient and its mean square is kept
PASSKEY_EVERY = 128  # tokens of text
PASSKEY_WORDS = 8  # the paper has 32
SINKS_SHARE, WINDOW_SHARE = 16, 4  # one token of so many of the text: 64 and 256 of 1,024, as is usual
REPORTED_PERCENT = (50, 100)  # of heads that stream

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Exercise:
    """A text with passkeys, the question and the answer. ``places``: tokens before those that an answer takes from a
    passkey: where the model decides about them.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]


def make_exercise(window: Window, passkeys: Passkeys, seed: Sequence[int]) -> Exercise:
    """Hides passkeys all over the window's text, where a streaming head sees them neither as sinks nor at its end."""
    assert passkeys.cues, "a text comes with passkeys to plant"
    rng = np.random.default_rng(seed)
    text = window.ids[window.first : window.end]
    count = max(1, min(len(text) // PASSKEY_EVERY, len(passkeys.cues)))
    cues = [passkeys.cues[index] for index in rng.permutation(len(passkeys.cues))[:count]]
    keys = [[passkeys.words[index] for index in rng.integers(0, len(passkeys.words), PASSKEY_WORDS)] for _ in cues]
    first, last = len(text) // SINKS_SHARE, len(text) - len(text) // WINDOW_SHARE
    ids, at = list(window.ids[: window.first]), 0
    for index, (cue, words) in enumerate(zip(cues, keys, strict=True)):
        place = first + int((index + rng.random()) * (last - first) / count)
        ids += [*text[at:place], *cue, *(token for word in words for token in word), *passkeys.end]
        at = place
    ids += [*text[at:], *passkeys.question]
    places: list[int] = []
    for index in rng.permutation(count):
        ids += cues[index]
        for word in keys[index]:
            places += range(len(ids) - 1, len(ids) - 1 + len(word))
            ids += word
        ids += passkeys.end
    return Exercise(tuple(ids), tuple(places))


class Student:
    """A frozen model with a gate for each KV head [L, K], whose streaming side sees ``sinks`` and ``window`` tokens."""

    def __init__(self, decoder: Decoder, sinks: int, window: int) -> None:
        self._decoder, self._torch = decoder, require_torch()
        self._sides = {"sinks": sinks, "window": window}
        self._teachers: dict[tuple[int, ...], Tensor] = {}

    def distance(self, exercise: Exercise, gates: Doubles) -> float:
        """Of the answer's hidden states from those with full attention, relative to these: both squared."""
        with self._torch.no_grad():
            return float(self._distance(exercise, self._residuals(exercise, self._tensor(gates))[-1]))

    def gradient(self, exercise: Exercise, gates: Doubles) -> tuple[float, Doubles]:
        """`distance`, and its derivative by each gate [L, K]."""
        torch, full = self._torch, self._tensor(gates)
        with torch.no_grad():
            residuals = self._residuals(exercise, full)
        last = residuals.pop().requires_grad_()
        distance = self._distance(exercise, last)
        (incoming,) = torch.autograd.grad(distance, last)
        found = torch.zeros_like(full)
        for layer in reversed(range(len(full))):
            read, gate = residuals.pop().requires_grad_(), full[layer].requires_grad_()
            after = self._layer(read, layer, gate)
            incoming, by_gate = torch.autograd.grad(after, (read, gate), incoming, allow_unused=True)
            if by_gate is not None:
                found[layer] = by_gate
        return distance.item(), found.double().numpy()

    def _tensor(self, gates: Doubles) -> Tensor:
        return self._torch.from_numpy(gates.astype(np.float32))

    def _layer(self, residual: Tensor, layer: int, gate: Tensor) -> Tensor:
        windowed = self._decoder.spec.attention_windows[layer]
        return self._decoder.layer(residual, layer, gates=None if windowed else Gates(gate, **self._sides))

    def _residuals(self, exercise: Exercise, full: Tensor) -> list[Tensor]:
        """Before the first layer, and after each."""
        found = [self._decoder.embedded(exercise.ids)]
        for layer, gate in enumerate(full):
            found.append(self._layer(found[-1], layer, gate))
        return found

    def _distance(self, exercise: Exercise, residual: Tensor) -> Tensor:
        places = list(exercise.places)
        if exercise.ids not in self._teachers:
            states = self._decoder.normed(self._decoder.run(exercise.ids)[places])
            self._teachers[exercise.ids] = states.clone()
        teacher = self._teachers[exercise.ids]
        student = self._decoder.normed(residual[places])
        return (student - teacher).square().sum() / teacher.square().sum()


@dataclass
class _State:
    """How far a run has come, and its file. One of another order, or a damaged one, is passed over."""

    path: Path
    key: str
    gates: Doubles
    """[steps + 1, L, K]: at the start and after each step."""
    moments: Doubles
    """[2, L, K]: Adam's."""
    distances: Doubles = field(default_factory=lambda: np.zeros(0))
    """[steps]: before each."""
    seconds: float = 0.0

    def load(self) -> None:
        with (
            contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
            self.path.open("rb") as file,
            np.load(file, allow_pickle=False) as saved,
        ):
            if str(saved["key"]) == self.key:
                found = {name: saved[name] for name in ("gates", "moments", "distances")}
                self.seconds = float(saved["seconds"])
                self.gates, self.moments, self.distances = found.values()

    def save(self, seconds: float) -> None:
        """Raises StorageError."""
        with temporary_file(self.path, bytes_needed=self.gates.nbytes) as file:
            np.savez(
                file, key=np.array(self.key), gates=self.gates, moments=self.moments, distances=self.distances,
                seconds=np.array(self.seconds + seconds),
            )  # fmt: skip

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()

    def step(self, distance: float, gradient: Doubles, trained: npt.NDArray[np.bool_]) -> None:
        """Adam, clipped to 0 ... 1; the gates of layers that are not ``trained`` [L] stay."""
        done = len(self.distances) + 1
        slope = np.where(trained[:, None], gradient + CHARGE / (trained.sum() * gradient.shape[1]), 0.0)
        keep = np.array(MOMENTS)
        self.moments = keep[:, None, None] * self.moments + (1 - keep)[:, None, None] * np.stack([slope, slope**2])
        mean, square = self.moments / (1 - keep**done)[:, None, None]
        gates = np.clip(self.gates[-1] - RATE * mean / (np.sqrt(square) + 1e-12), 0, 1)
        self.gates = np.concatenate([self.gates, gates[None]])
        self.distances = np.append(self.distances, distance)


def calibrate_duo(
    package: Package, text: Text, order: Order, *, threads: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Trains the gates, writes the scores into the package, and returns the record (docs/calibration.md has its keys).

    ``progress`` counts tokens of the text, those of each step anew; the order's target means nothing here. Stopped, the
    same call goes on after the last whole step.

    Raises:
        OptionError: torch is not installed, or the text is too short.
        ModelError: the model has experts, or no layer that sees everything.
        StorageError: the package's folder cannot be written.
    """
    windows = cut_windows(text, replace(order, target="later"))  # each window is read once
    decoder, size = Decoder(package), order.window_tokens
    trained = np.array([not window for window in decoder.spec.attention_windows])
    if not trained.any():
        raise ModelError(f"all layers of {package.folder} have windows of their own; no head of it need stream")
    exercises = [make_exercise(window, text.passkeys, (order.seed, at)) for at, window in enumerate(windows)]
    tested = held_out(len(windows))
    learnt, student = len(windows) - tested, Student(decoder, size // SINKS_SHARE, size // WINDOW_SHARE)
    key = json.dumps([package_mark(package), text.sha256, asdict(order), asdict(text.passkeys)])
    shape = (decoder.spec.layers, decoder.spec.kv_heads)
    state = _State(calibration_folder(package) / STATE_FILE, key, np.ones((1, *shape)), np.zeros((2, *shape)))
    state.load()
    report, begun = progress or no_progress, time.perf_counter()
    with torch_threads(threads):
        for step in range(len(state.distances), STEPS):
            report("calibrating", step * size, STEPS * size)
            state.step(*student.gradient(exercises[step % learnt], state.gates[-1]), trained)
            state.save(time.perf_counter() - begun)
        report("calibrating", STEPS * size, STEPS * size)
        scores = state.gates.mean(axis=0)
        distances = {
            f"distance_of_{percent}": float(np.mean([student.distance(each, gates) for each in exercises[learnt:]]))
            for percent, gates in ((percent, _closed(scores, trained, percent)) for percent in REPORTED_PERCENT)
        }
    figures = {
        "paper": "DuoAttention, arXiv 2410.10819",
        "window_tokens": size,
        "seed": order.seed,
        "steps": STEPS,
        "tokens": min(STEPS, learnt) * size,
        "held_out_tokens": tested * size,
        "text_tokens": len(text.ids),
        "text_sha256": text.sha256,
        "distance_of_step": state.distances.round(4).tolist(),
        **{name: round(distance, 4) for name, distance in distances.items()},
        "gate_of_head": state.gates[-1].round(4).tolist(),
        "seconds": round(state.seconds + time.perf_counter() - begun, 1),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    record = write_head_scores(package, METHOD, scores, figures)
    state.remove()
    return record


def _closed(scores: Doubles, trained: npt.NDArray[np.bool_], percent: int) -> Doubles:
    """Gates [L, K]: 0 for the lowest scores of trained layers, 1 for the others."""
    order = np.argsort(np.where(trained[:, None], scores, np.inf), axis=None, kind="stable")
    gates = np.ones(scores.size)
    gates[order[: int(trained.sum()) * scores.shape[1] * percent // 100]] = 0
    return gates.reshape(scores.shape)
