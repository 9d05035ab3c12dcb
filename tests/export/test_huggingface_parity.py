"""Tiny models that transformers saved, exported from their folders: its logits are ours.

The weights are whole multiples of one power of two per block of 32, the largest 127: 8-bit blocks hold them
exactly, so what is left is the rounding of the arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import satchel
from reference_model import reference_from_package
from satchel.export.exporter import export_model
from tiny_folders import tiny_tokenizer, write_json

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# name -> (model_type, more of its config, type of the file)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "float32"),
    "llama, output tied": ("llama", {"tie_word_embeddings": True}, "float32"),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "float32"),
    "llama in bfloat16": ("llama", {}, "bfloat16"),
    "llama in float16": ("llama", {}, "float16"),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}, "float32"),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}, "float32"),
    "llama, YaRN": ("llama", {"rope_parameters": YARN}, "float32"),
    "llama, wide heads": ("llama", {"head_dim": 32}, "float32"),
    "qwen2": ("qwen2", {}, "float32"),
    "qwen2 in bfloat16": ("qwen2", {"tie_word_embeddings": True}, "bfloat16"),
    "qwen2, YaRN": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.25}}, "float32"),
}
IDS = np.random.default_rng(0).integers(0, 256, 90)
Floats = npt.NDArray[np.float32]


def representable(parameter: Any, rng: np.random.Generator) -> Any:
    """Random values of the parameter's shape that 8-bit blocks (and bfloat16, float16) hold exactly."""
    import torch

    shape = tuple(parameter.shape)
    if len(shape) == 1:
        values = (rng.integers(48, 80, shape) / 64).astype(np.float32)
    else:
        codes = rng.integers(-127, 128, (*shape[:-1], shape[-1] // 32, 32))
        codes[..., 0] = 127
        # an embedding of small rows or a query of weak scores would make every token alike
        step = 2.0 ** np.round(np.log2(2.5 / np.sqrt(shape[-1]) / 73))
        values = (codes * step).reshape(shape).astype(np.float32)
    return torch.from_numpy(values)


def save(name: str, folder: Path) -> Floats:
    """Writes the model's folder; its logits for ``IDS`` in float32 [T, vocab]."""
    torch = pytest.importorskip("torch", reason="needs the extra 'reference'")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'reference'")
    kind, more, dtype = MODELS[name]
    rng = np.random.default_rng(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SIZES, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(representable(parameter, rng))
        logits: Floats = model.eval()(torch.from_numpy(IDS)[None]).logits[0].numpy()
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="60KB")
    write_json(folder / "tokenizer.json", tiny_tokenizer())
    return logits


@pytest.mark.filterwarnings("default")  # torch and transformers warn about themselves
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    wanted = save(name, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    package = export_model(tmp_path / "hf", tmp_path / "package")
    assert {record["max_error"] for record in package.manifest.matrices} == {0.0}
    found = reference_from_package(package.folder).logits(IDS.tolist())
    spread = float(np.ptp(wanted))
    assert np.abs(found - wanted).max() <= 1e-4 * spread
    assert np.abs(np.roll(found, 1, axis=0) - wanted).max() > 0.1 * spread, "the rows of logits are not all alike"
    with satchel.load(package.folder, kv={"storage": "fp32"}, cache_dir=tmp_path / "cache") as model:
        for length in (1, 2, 64, 65, len(IDS)):
            error = np.abs(model.last_logits(IDS[:length].tolist()) - wanted[length - 1]).max()
            assert error <= 1e-2 * spread, f"after {length} tokens"


@pytest.mark.filterwarnings("default")
def test_a_planted_error_is_found(tmp_path: Path) -> None:
    """The scaling of the frequencies matters at these positions: without it, the comparison fails."""
    wanted = save("llama 3", tmp_path / "hf")
    plain = save("llama", tmp_path / "plain")
    assert np.abs(plain - wanted).max() > 1e-2 * np.ptp(wanted)
