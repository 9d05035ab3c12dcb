"""Attention-Gate's calibration: what its heads learn from, and that they learn from their neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from satchel.export.calibration import gate_head
from satchel.export.calibration.retention import pair_features
from satchel.export.calibration.text import Order, Text, cut_windows
from satchel.export.package import Package

torch = pytest.importorskip("torch", reason="needs the extra 'calibrate'")
from satchel.export.calibration.attention_gate import RECIPE  # noqa: E402
from satchel.export.calibration.decoder import Decoder  # noqa: E402
from satchel.export.calibration.labels import AnswerAttention, Labels, WorthOfPairs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch warns about itself
RNG = np.random.default_rng(2)
FEATURES = 48


def test_kvzaps_labels_with_locrets_features(package: Package) -> None:
    ids = tuple(int(index) for index in RNG.integers(3, 250, 100))
    window = cut_windows(Text(ids, (7, 8), (20, 21)), Order(window_tokens=32))[0]
    taken: dict[type[Labels], list[Any]] = {}
    for kind in (Labels, AnswerAttention, WorthOfPairs):
        taken[kind] = []
        labels = kind(window, package.spec.attention_windows, lambda *given, kind=kind: taken[kind].append(given))
        Decoder(package).run(window.ids, labels, whole=False)
        labels.finish()
    for (_, _, worth), (_, features, attention), found in zip(*taken.values(), strict=True):
        np.testing.assert_array_equal(found[2], worth)
        np.testing.assert_array_equal(found[1], features)
        assert features.shape[1] == pair_features(package.spec)
        assert not np.allclose(attention, worth)
    assert RECIPE.labels is WorthOfPairs


def planted(windows: int) -> tuple[Any, Any]:
    """Tokens of which some come twice in their window; labels say so of one KV head, and of the other one feature."""
    x = RNG.normal(size=(windows, 64, FEATURES))
    twice = np.zeros((windows, 64))
    for at in range(windows):
        places = RNG.permutation(64)[:24]
        x[at, places[:12]] = x[at, places[12:]]
        twice[at, places] = 1
    return (x * 3 + 1).astype(np.float32), np.stack([twice, x[..., 0]], axis=2).astype(np.float32)


def test_a_gate_learns_from_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_head, "EPOCHS", 100)
    monkeypatch.setattr(gate_head, "CHUNKS", (64,))
    calls: list[tuple[int, int]] = []
    gate = gate_head.trained_gate(*planted(40), seed=3, report=lambda *given: calls.append(given))
    assert calls[-1][0] == calls[-1][1] == 100 * 40 * 64
    x, y = planted(6)
    together = gate_head.held_out_figures(x, y, gate)
    deaf = gate_head.held_out_figures(x, y, replace(gate, mixed=0 * gate.mixed))
    monkeypatch.setattr(gate_head, "MEASURED_CHUNK", 1)
    alone = gate_head.held_out_figures(x, y, gate)
    np.testing.assert_allclose(alone, deaf, rtol=1e-4)
    assert together[1] > deaf[1] + 0.1
    assert together[2] > deaf[2] + 0.1
    assert together[0] < deaf[0]


def test_the_order_of_neighbours_does_not_matter() -> None:
    """Nor do tokens of other chunks: a gate has no positions."""
    x, y = planted(2)
    gate = gate_head.trained_gate(x, y, seed=1, report=lambda *_: None)
    tensors = gate_head.Gate(**{name: torch.from_numpy(part) for name, part in vars(gate).items()})
    order = RNG.permutation(64)
    chunk = torch.from_numpy(x[0])
    torch.testing.assert_close(tensors.scores(chunk[order]), tensors.scores(chunk)[order])
    together = tensors.scores(torch.from_numpy(x))
    torch.testing.assert_close(together[0], tensors.scores(chunk))
    assert not torch.allclose(tensors.scores(chunk[:32]), tensors.scores(chunk)[:32])


def test_the_loss_by_hand() -> None:
    scores, labels = torch.tensor([[[0.5], [3.0]]]), torch.tensor([[[0.0], [1.0]]])
    found = float(gate_head.loss_of(torch, scores, labels, torch.tensor([[[0.25]]])))
    smooth = (0.5**2 / 2 + 2.0 - 0.5) / 2
    slope = gate_head.FLAG_SLOPE
    flagged = (np.log1p(np.exp(slope * 0.25)) + np.log1p(np.exp(-slope * 2.75))) / 2  # goes, stays
    assert found == pytest.approx(smooth + gate_head.FLAG_SHARE * flagged, rel=1e-5)
    np.testing.assert_allclose(gate_head._last_that_stays(np.arange(17, dtype=np.float32)[None, :, None]), 14)
