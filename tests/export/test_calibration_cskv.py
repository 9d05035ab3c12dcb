"""CSKV's projections: the best of their rank in the measure that they are for, and a run that can be stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel.errors import ModelError, OptionError
from satchel.export.calibration import files, lowrank
from satchel.export.exporter import export_model
from satchel.export.package import Package
from satchel.export.spec import RopeSpec
from tiny_models import write_tiny_gguf

torch = pytest.importorskip("torch", reason="needs the extra 'calibrate'")
from satchel.export.calibration import cskv  # noqa: E402
from satchel.export.calibration.cskv import best_projection, calibrate_cskv, pair_measure, turned  # noqa: E402
from satchel.export.calibration.decoder import Decoder  # noqa: E402
from satchel.export.calibration.text import Order, Text  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch warns about itself
RNG = np.random.default_rng(1)
TEXT = Text(tuple(int(index) for index in RNG.integers(3, 250, 330)), before=(7, 8, 9))
ORDER = Order(window_tokens=40)
Array = NDArray[np.float64]


# --- the projection


def products(size: int, tokens: int = 200) -> Array:
    x = RNG.normal(size=(tokens, size)) @ RNG.normal(size=(size, size))
    found: Array = x.T @ x / tokens
    return found


def cost(encoder: Array, decoder: Array, rank: int, covariance: Array, measure: Array) -> float:
    rest = np.eye(len(covariance)) - encoder[:, :rank] @ decoder[:rank]
    return float(np.trace(rest.T @ covariance @ rest @ measure))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_no_other_projection_of_the_rank_costs_less(rank: int) -> None:
    """Against descent from random factors: closed form is where training ends."""
    covariance, measure = products(8), products(8)
    encoder, decoder = best_projection(covariance, measure)
    best = cost(encoder, decoder, rank, covariance, measure)
    c, m = torch.from_numpy(covariance), torch.from_numpy(measure)
    factors = [torch.from_numpy(RNG.normal(size=shape)).requires_grad_() for shape in ((8, rank), (rank, 8))]
    descent = torch.optim.LBFGS(factors, max_iter=2000, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss() -> Any:
        descent.zero_grad()
        rest = torch.eye(8, dtype=torch.float64) - factors[0] @ factors[1]
        value = torch.trace(rest.T @ c @ rest @ m)
        value.backward()
        return value

    descent.step(loss)
    trained = loss().item()
    assert best <= trained * (1 + 1e-9)
    assert trained <= best * 1.05  # it gets there, or nearly
    plain = best_projection(covariance, np.eye(8))
    assert best < cost(*plain, rank, covariance, measure)


def test_linear_factors_of_what_the_layer_reads_are_no_better() -> None:
    """Keys are x W; the best x A B of a rank is the keys' own principal components (reduced-rank regression)."""
    x, weight = RNG.normal(size=(300, 20)) @ RNG.normal(size=(20, 20)), RNG.normal(size=(20, 8))
    keys = x @ weight
    encoder, decoder = best_projection(keys.T @ keys / 300, np.eye(8))
    ours = float(np.square(keys - keys @ encoder[:, :3] @ decoder[:3]).sum())
    # of all matrices of rank 3: the truncated SVD of the best fit, which is keys themselves
    left, values, right = np.linalg.svd(keys, full_matrices=False)
    assert ours == pytest.approx(float(np.square(values[3:]).sum()), rel=1e-9)
    fitted = np.linalg.lstsq(x, (left[:, :3] * values[:3]) @ right[:3], rcond=None)[0]
    assert np.linalg.matrix_rank(fitted, tol=1e-8) == 3
    assert float(np.square(keys - x @ fitted).sum()) == pytest.approx(ours, rel=1e-9)


def test_all_coefficients_give_everything_back() -> None:
    encoder, decoder = best_projection(products(16), products(16))
    np.testing.assert_allclose(encoder @ decoder, np.eye(16), atol=1e-9)


def test_coefficients_are_worth_as_much_as_each_other() -> None:
    """An error of one costs its square, whichever it is: their quantizers need not know."""
    covariance, measure = products(16), products(16)
    _, decoder = best_projection(covariance, measure)
    np.testing.assert_allclose(decoder @ measure @ decoder.T, np.eye(16), atol=1e-8)


def test_keys_and_values_together_tell_more_than_apart() -> None:
    """Of what is made from the same few inputs; and either counts by its own spread, whatever its unit."""
    inputs = RNG.normal(size=(500, 6))
    pairs = inputs @ RNG.normal(size=(6, 16)) + 0.01 * RNG.normal(size=(500, 16))
    pairs[:, :8] *= 1000
    covariance, measures = np.cov(pairs.T), (products(8), products(8))
    measure = pair_measure(covariance, *measures)
    both = best_projection(covariance, measure)
    apart = np.zeros((16, 16)), np.zeros((16, 16))
    for at in (slice(0, 8), slice(8, 16)):
        for found, one in zip(apart, best_projection(covariance[at, at], measure[at, at]), strict=True):
            found[at, at] = one
    order = [0, 8, 1, 9, 2, 10]  # three coefficients of either
    apart = apart[0][:, order], apart[1][order]
    assert cost(*both, 6, covariance, measure) < 0.01 * cost(*apart, 6, covariance, measure)
    assert cost(*both, 0, covariance, measure) == pytest.approx(cskv.KEY_WEIGHT + 1)
    still = pair_measure(np.zeros((16, 16)), *measures)
    assert np.isfinite(best_projection(np.zeros((16, 16)), still)[0]).all()


@pytest.mark.parametrize("dead", ["measure", "covariance", "one direction"])
def test_heads_that_nobody_reads_or_that_never_move(dead: str) -> None:
    covariance, measure = products(8), products(8)
    if dead == "measure":
        measure[:] = 0
    elif dead == "covariance":
        covariance[:] = 0
    else:
        measure[3], measure[:, 3] = 0, 0
    encoder, decoder = best_projection(covariance, measure)
    assert np.isfinite(encoder).all()
    assert np.abs(encoder).max() < 1e4
    np.testing.assert_allclose(encoder @ decoder, np.eye(8), atol=1e-6)


def test_queries_meet_keys_turned_by_the_distance() -> None:
    """q . R_d k over the distances is what the measure says; channels that RoPE leaves alone stay."""
    rope = RopeSpec(dims=6, base=100.0)
    query, key = RNG.normal(size=(2, 8))
    measure = turned(np.outer(query, query)[None], rope)[0]
    frequencies = (100.0 ** (-np.arange(3) / 3)).astype(np.float32).astype(np.float64)
    total = 0.0
    for distance in cskv.DISTANCES:  # the query is so much later
        angle = distance * frequencies
        first, second = query[:3], query[3:6]
        turn = np.concatenate([
            first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle), query[6:],
        ])  # fmt: skip
        total += float(turn @ key) ** 2 / len(cskv.DISTANCES)
    assert key @ measure @ key == pytest.approx(total, rel=1e-9)
    np.testing.assert_array_equal(turned(measure[None], None)[0], measure)


# --- the run


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_a_run_writes_projections_and_figures(architecture: str, tmp_path: Path) -> None:
    package = export_model(write_tiny_gguf(tmp_path / "tiny.gguf", architecture), tmp_path / "package")
    spec, stages = package.spec, []
    record = calibrate_cskv(package, TEXT, ORDER, threads=1, progress=lambda *given: stages.append(given))
    assert stages[-1] == ("calibrating", 320, 320)
    assert (record["tokens"], record["held_out_tokens"], record["window_tokens"], record["seed"]) == (280, 40, 40, 0)
    for side in ("key", "value"):
        half, fifth = record[f"{side}_error_of_50"], record[f"{side}_error_of_20"]
        assert 0 < half < fifth < 1.1
        assert len(record[f"{side}_error_of_50_of_layer"]) == spec.layers
    assert files.read_records(package.folder) == {"cskv": record}
    assert not (package.folder / "calibration" / cskv.SUMS_FILE).exists()
    basis, sha256 = lowrank.open_lowrank(package, "cskv", range(spec.layers), (5, 7))
    assert (basis.key_rank, basis.value_rank, sha256) == (5, 7, record["sha256"])


def test_moments_are_those_of_the_activations(package: Package) -> None:
    """Against all tokens at once: window by window, each without its first tokens; of pairs, block by block."""
    spec = package.spec
    window = cskv.cut_windows(TEXT, ORDER)[0]
    seen: list[Any] = []

    class Everything:
        def enter(self, activations: Any) -> None:
            seen.append(activations)

        def attended(self, *_: Any) -> None: ...

    Decoder(package).run(window.ids, Everything(), whole=False)
    moments = cskv.Moments(spec.layers, spec.kv_heads, spec.head_size)
    outputs = np.zeros((spec.layers, spec.kv_heads, spec.head_size, spec.head_size))
    Decoder(package).run(window.ids, cskv._Watch(window, moments, outputs), whole=False)
    rows = slice(3 + cskv.FIRST_TOKENS, 43)
    for layer, found in enumerate(seen):
        for head in range(spec.kv_heads):
            block = slice(rows.start, rows.start + 16)  # the only whole one
            x = np.hstack([part[block, head].double().numpy() for part in (found.keys, found.values)])
            np.testing.assert_allclose(
                moments.covariance(layer)[head], np.cov(x.T, bias=True), rtol=1e-6, atol=1e-9
            )
            group = spec.heads // spec.kv_heads
            mine = found.queries[rows, head * group : (head + 1) * group].double().numpy()
            queries = mine.reshape(-1, spec.head_size)
            np.testing.assert_allclose(moments.queries_squared[layer, head], queries.T @ queries, rtol=1e-6, atol=1e-9)
            value, added = RNG.normal(size=spec.head_size), 0.0
            for query_head in range(head * group, (head + 1) * group):
                part = found.output_weight[:, query_head * spec.head_size : (query_head + 1) * spec.head_size]
                added += float(np.square(part.double().numpy() @ value).sum())
            assert value @ outputs[layer, head] @ value == pytest.approx(added, rel=1e-6)


class StopError(Exception):
    """Ctrl-C."""


def test_a_stopped_run_goes_on_and_ends_the_same(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole, stopped = (export_model(source, tmp_path / name) for name in ("whole", "stopped"))
    expected = calibrate_cskv(whole, TEXT, ORDER, threads=1)
    read, run = [], Decoder.run

    def count(self: Decoder, ids: Any, *more: Any, **named: Any) -> Any:
        read.append(ids)
        return run(self, ids, *more, **named)

    monkeypatch.setattr(Decoder, "run", count)

    def stop(stage: str, done: int, total: int) -> None:
        if done >= 3 * 40:
            raise StopError

    with pytest.raises(StopError):
        calibrate_cskv(stopped, TEXT, ORDER, threads=1, progress=stop)
    partial = stopped.folder / "calibration" / cskv.SUMS_FILE
    assert partial.exists()
    found = calibrate_cskv(stopped, TEXT, ORDER, threads=1)
    assert len(read) == 8
    assert found["sha256"] == expected["sha256"]
    partial.write_bytes(b"PK\x03\x04 not at all")
    assert calibrate_cskv(stopped, TEXT, ORDER, threads=1)["sha256"] == expected["sha256"]
    assert len(read) == 16


def test_a_short_text_is_refused(package: Package) -> None:
    with pytest.raises(OptionError, match="needs two windows of 200 or more"):
        calibrate_cskv(package, TEXT, Order(window_tokens=200), threads=1)


def test_numbers_that_no_sum_can_hold_are_refused(package: Package) -> None:
    spec = package.spec
    huge = np.full((spec.layers, spec.kv_heads, 2 * spec.head_size, 2 * spec.head_size), 1e30, np.float32)
    lowrank.write_lowrank(package, "cskv", lowrank.Projections(huge, huge), {})
    with pytest.raises(ModelError, match="calibration for cskv in .* cannot be used .*; repeat it: satchel calibrate"):
        lowrank.open_lowrank(package, "cskv", range(spec.layers), (4, 4))
