"""Locret's calibration: labels against their definition, and a head that learns."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from satchel.export.calibration import retaining_head
from satchel.export.calibration.retention import pair_features
from satchel.export.calibration.text import Order, Text, cut_windows
from satchel.export.exporter import export_model
from tiny_models import write_tiny_gguf

torch = pytest.importorskip("torch", reason="needs the extra 'calibrate'")
from satchel.export.calibration.decoder import Decoder  # noqa: E402
from satchel.export.calibration.labels import AnswerAttention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch warns about itself
RNG = np.random.default_rng(1)
IDS = tuple(int(index) for index in RNG.integers(3, 250, 330))
TEXT = Text(IDS, before=(7, 8, 9), request=(20, 21, 22, 23))
ORDER = Order(window_tokens=32)


# --- labels


class Activations:
    def __init__(self) -> None:
        self.found: list[Any] = []

    def enter(self, activations: Any) -> None:
        self.found.append(activations)

    def attended(self, *_: Any) -> None: ...


@pytest.mark.parametrize(("architecture", "target"), [("qwen2", "repeat"), ("qwen2", "later"), ("gemma3", "repeat")])
def test_labels_are_what_they_say(
    architecture: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token and query by query: the logit, less the logarithm of what the query gives to all that it sees."""
    made = export_model(write_tiny_gguf(tmp_path / "tiny.gguf", architecture), tmp_path / "package")
    monkeypatch.setattr("satchel.export.calibration.decoder.ROW_BLOCK", 7)
    decoder, spec = Decoder(made), made.spec
    window, seen = cut_windows(TEXT, replace(ORDER, target=target))[0], Activations()
    decoder.run(window.ids, seen, whole=False)
    taken: list[tuple[int, Any, Any]] = []
    labels = AnswerAttention(window, spec.attention_windows, lambda *given: taken.append(given))
    decoder.run(window.ids, labels, whole=False)
    labels.finish()
    assert [layer for layer, _, _ in taken] == list(range(spec.layers))
    count, group = len(window.ids), spec.heads // spec.kv_heads
    behind = torch.arange(count)[:, None] - torch.arange(count)
    for layer, features, found in taken:
        layer_seen, reach = seen.found[layer], spec.attention_windows[layer]
        assert features.shape == (32, pair_features(spec))
        parts = features.split([spec.heads * spec.head_size, *[spec.kv_heads * spec.head_size] * 2], dim=1)
        for part, whole in zip(parts, (layer_seen.queries, layer_seen.keys, layer_seen.values), strict=True):
            torch.testing.assert_close(part, whole[3:35].flatten(1))
        unseen = (behind < 0) | ((behind >= reach) if reach else torch.tensor(False))
        for head in range(spec.kv_heads):
            best = torch.full((count, count), -math.inf)
            for query_head in range(head * group, (head + 1) * group):
                logits = layer_seen.turned_queries[:, query_head] @ layer_seen.turned_keys[:, head].T
                logits = (logits * spec.attention_scale).masked_fill(unseen, -math.inf)
                best = best.maximum(logits - logits.logsumexp(dim=1, keepdim=True))
            for token in range(3, 35):
                answers = window.repeated is not None and not reach
                by_hand = best[window.repeated if answers else token + 1 :, token]
                expected = float(by_hand.max()) if len(by_hand) else math.log(1e-12)
                assert float(found[token - 3, head]) == pytest.approx(max(expected, math.log(1e-12)), abs=1e-3)


# --- training


CONSTANT = np.array([0, 0, 0, 0, 0, 2], np.float32)


def planted(windows: int) -> tuple[Any, Any]:
    """Features of very different sizes (one is constant, as biases make them), labels a bent function of them."""
    x = RNG.normal(size=(windows, 64, 6)).astype(np.float32) * np.array([1, 100, 0.01, 1, 1, 0], np.float32) + CONSTANT
    y = np.stack([np.abs(x[..., 0]) + 5, x[..., 1] / 100 * 3], axis=2)
    return x, y.astype(np.float32)


def test_a_head_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retaining_head, "EPOCHS", 40)
    calls: list[tuple[int, int]] = []
    head = retaining_head.trained_head(*planted(20), seed=3, report=lambda *given: calls.append(given))
    width = retaining_head.WIDTH
    assert [part.shape for part in vars(head).values()] == [(width, 6), (width,), (2, width), (2,)]
    assert calls[-1][0] == calls[-1][1] == 40 * 20 * 64
    loss, r2, spearman, best = retaining_head.held_out_figures(*planted(4), head)
    assert loss < 0.15
    assert r2 > 0.9
    assert spearman > 0.8
    assert best > 0.8
    blind = retaining_head.held_out_figures(*planted(4), replace(head, outer=0 * head.outer))
    assert blind[0] > 0.5
    assert blind[1] < 0.1
    again = retaining_head.trained_head(*planted(20), seed=4, report=lambda *_: None)
    assert not np.array_equal(head.inner, again.inner)


def test_the_figures_are_what_they_say() -> None:
    """A head that says SiLU of the first feature, on labels that are its square root or the negative."""
    x = np.linspace(0.5, 6, 40, dtype=np.float32).reshape(2, 20, 1)
    parts = [[1.0]], [0.0], [[1.0], [1.0]], [0.0, 0.0]
    head = retaining_head.Head(*(np.array(part, np.float32) for part in parts))
    said = x[..., 0] / (1 + np.exp(-x[..., 0]))
    y = np.stack([np.sqrt(x[..., 0]), -x[..., 0]], axis=2)
    loss, r2, spearman, best = retaining_head.held_out_figures(x, y, head)
    assert best == pytest.approx(0.5)  # all of the one's, none of the other's
    assert spearman == pytest.approx(0, abs=1e-6)  # 1 for one head, -1 for the other
    distance = np.abs(said[..., None] - y)
    smooth = np.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
    assert loss == pytest.approx(smooth + 0.0025 * np.square(np.diff(said, axis=1)).mean(), rel=1e-4)
    spread = np.square(y - y.mean(axis=(0, 1))).sum()
    assert r2 == pytest.approx(1 - np.square(distance).sum() / spread, rel=1e-4)
