"""The decoder that calibration looks into, against the runtime: the same logits, and attention that adds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import satchel
from satchel import kernels
from satchel.errors import ModelError
from satchel.export.exporter import export_model
from satchel.export.package import Package
from tiny_models import write_tiny_gguf

torch = pytest.importorskip("torch", reason="needs the extra 'calibrate'")
from satchel.export.calibration import decoder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch warns about itself
IDS = [int(index) for index in np.random.default_rng(5).integers(3, 250, 70)]  # longer than all windows below
LARGEST_ERROR = 2e-3  # of the logits' range: activations are rounded to 16 bits in the runtime, here they are not
# name -> arguments of write_tiny_gguf
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2, output of its own": {"output": "separate"},
    "llama": {"architecture": "llama"},
    "llama 3": {"architecture": "llama", "rope_factors": (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 8.0)},
    "yarn": {"metadata": {
        ".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.original_context_length": 128,
    }},
    **{name: {"architecture": name} for name in ("gemma2", "gemma3", "granite", "olmo2", "phi3", "qwen3", "smollm3")},
}  # fmt: skip


@pytest.fixture(autouse=True)
def sixteen_bit_activations() -> Any:
    before = kernels.active_variant()
    kernels.select_variant("baseline")
    yield
    kernels.select_variant(before)


def made(tmp_path: Path, **options: Any) -> Package:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", **options)
    return export_model(source, tmp_path / "package")


@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits_as_the_runtime(name: str, tmp_path: Path) -> None:
    package = made(tmp_path, **MODELS[name])
    with satchel.load(package.folder, policy="full", kv={"storage": "fp32"}, threads=1, cache=False) as model:
        theirs = model.logits(IDS)
    ours = decoder.Decoder(package).logits(IDS)
    assert np.abs(ours - theirs).max() <= LARGEST_ERROR * np.ptp(theirs)


def test_blocks_of_queries_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = made(tmp_path, architecture="gemma2")
    whole = decoder.Decoder(package).logits(IDS)
    monkeypatch.setattr(decoder, "ROW_BLOCK", 7)
    np.testing.assert_allclose(decoder.Decoder(package).logits(IDS), whole, atol=1e-4 * np.ptp(whole))


class Watcher:
    """Rebuilds each head's attention from what an observer is shown."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.sums: list[float] = []
        self.unseen = 0.0

    def enter(self, activations: Any) -> None:
        self.layers.append(activations)

    def attended(self, _head: int, first: int, weights: Any) -> None:
        self.sums += weights.sum(dim=1).tolist()
        self.unseen = max(self.unseen, float(weights.triu(first + 1).max()) if weights.shape[1] > first + 1 else 0.0)


def test_an_observer_sees_every_layer(tmp_path: Path) -> None:
    package, watcher = made(tmp_path, architecture="qwen3"), Watcher()
    spec = package.spec
    decoder.Decoder(package).run(IDS, watcher, whole=False)
    assert [found.layer for found in watcher.layers] == list(range(spec.layers))
    first = watcher.layers[0]
    assert first.inputs.shape == (len(IDS), spec.hidden)
    assert first.queries.shape == first.turned_queries.shape == (len(IDS), spec.heads, spec.head_size)
    assert first.keys.shape == first.values.shape == (len(IDS), spec.kv_heads, spec.head_size)
    assert first.output_weight.shape == (spec.hidden, spec.heads * spec.head_size)
    torch.testing.assert_close(first.queries[0], first.turned_queries[0])  # position 0 is not turned
    assert not torch.allclose(first.queries[9], first.turned_queries[9])
    assert len(watcher.sums) == spec.layers * spec.heads * len(IDS)
    np.testing.assert_allclose(watcher.sums, 1, rtol=1e-5)
    assert watcher.unseen == 0


def test_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="mixture of experts.*use a dense model"):
        decoder.Decoder(made(tmp_path, architecture="qwen3moe"))


def test_other_flavours_are_refused(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    package = export_model(source, tmp_path / "package", flavour="portable")
    with pytest.raises(ModelError, match="portable flavour; calibrate the model's native package"):
        decoder.Decoder(package)
