"""RazorAttention's scores against their definition, and what the calibration leaves behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from satchel.export.calibration.files import open_calibration, read_records
from satchel.export.calibration.head_scores import SCORES
from satchel.export.package import Package

torch = pytest.importorskip("torch", reason="needs the extra 'calibrate'")
from satchel.export.calibration import decoder, razor  # noqa: E402
from satchel.export.calibration.razor import (  # noqa: E402
    REPEATS,
    EchoesAndInductions,
    calibrate_razor,
    repeated_tokens,
    scores_of_heads,
)
from satchel.export.calibration.text import Order, Text  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch warns about itself
TEXT = Text(tuple(range(3, 90)), before=(7, 8, 9), request=(20, 21))
PERIOD = 20


def test_tokens_repeat() -> None:
    ids = repeated_tokens(200, PERIOD, (7, 8, 9), seed=1)
    assert ids[:3] == [7, 8, 9]
    assert len(ids) == 3 + REPEATS * PERIOD
    assert len(set(ids[3 : 3 + PERIOD])) == PERIOD
    assert ids[3:-PERIOD] == ids[3 + PERIOD :]
    assert ids == repeated_tokens(200, PERIOD, (7, 8, 9), seed=1) != repeated_tokens(200, PERIOD, (7, 8, 9), seed=2)
    assert len(repeated_tokens(5, PERIOD, (), seed=1)) == REPEATS * PERIOD  # ids come twice then


def planted(kind: str) -> Any:
    """Attention [T, T] of a head that looks at the same token before, at the one after it, or at the newest ones."""
    tokens = 3 + REPEATS * PERIOD
    weights = np.zeros((tokens, tokens), np.float32)
    for row in range(tokens):
        back = {"echo": PERIOD, "induction": PERIOD - 1, "far echo": 2 * PERIOD, "near": 0, "other": PERIOD + 1}[kind]
        weights[row, max(row - back, 0)] = 1
    return torch.from_numpy(weights)


@pytest.mark.parametrize(
    ("kind", "echo", "induction"),
    [("echo", 1, 0), ("induction", 0, 1), ("far echo", 2 / 3, 0), ("near", 0, 0), ("other", 0, 0)],
)
@pytest.mark.parametrize("block", [83, 30, 1])
def test_scores_of_planted_heads(kind: str, echo: float, induction: float, block: int) -> None:
    seen, weights = EchoesAndInductions(1, 2, 3, PERIOD, lambda _: None), planted(kind)
    for first in range(0, len(weights), block):
        end = min(first + block, len(weights))
        seen.attended(1, first, weights[first:end, :end])
    np.testing.assert_allclose(seen.echo, [[0, echo]], atol=1e-6)
    # an induction head's first query finds the token after the one before in its own period
    np.testing.assert_allclose(seen.induction, [[0, induction]], atol=1e-6)


def test_a_kv_head_is_its_best_query_head() -> None:
    echo, induction = np.array([[0.1, 0.0, 0.2, 0.1]]), np.array([[0.0, 0.3, 0.0, 0.0]])
    np.testing.assert_array_equal(scores_of_heads(echo, induction, 2), [[0.3, 0.2]])


@pytest.mark.parametrize("block", [512, 32])
def test_the_whole_of_it(package: Package, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "ROW_BLOCK", block)
    stages: list[tuple[str, int, int]] = []
    record = calibrate_razor(
        package, TEXT, Order(window_tokens=32), threads=1, progress=lambda *stage: stages.append(stage)
    )
    spec = package.spec
    scores = open_calibration(package, "razor", {SCORES: (spec.layers, spec.kv_heads)}).tensors[SCORES]
    assert (scores > 0).all()
    assert (scores <= 1).all()
    np.testing.assert_allclose(record["score_of_head"], scores, atol=1e-5)
    assert (record["tokens"], record["window_tokens"], record["seed"]) == (3 + 4 * 32, 32, 0)
    assert np.shape(record["echo"]) == np.shape(record["induction"]) == (spec.layers, spec.heads)
    assert read_records(package.folder)["razor"] == record
    assert stages[-1] == ("calibrating", 131, 131)
    assert [done for _, done, _ in stages] == sorted(done for _, done, _ in stages)


def test_the_seed_decides(package: Package) -> None:
    files = []
    for seed in (0, 0, 1):
        calibrate_razor(package, TEXT, Order(window_tokens=32, seed=seed), threads=1)
        files.append((package.folder / "calibration" / f"{razor.METHOD}.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
