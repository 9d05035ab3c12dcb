"""Every family against ``transformers``: a tiny seeded model of each, saved as a folder, exported, run in chunks.

The matrices' weights are 8-bit numbers times a power of two, so that packing loses nothing, and kernels run in the
variant with 16-bit activations: what is left is rounding, and a wrong norm, scale, window or rotation stands out. The
second test puts such a fault into each family's spec and sees the first one's check fail.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_folders import LLAMA3
from numpy.typing import NDArray
from satchel import kernels
from satchel.cache import CacheSettings, KVCache
from satchel.errors import ModelError
from satchel.export.architectures import ARCHITECTURES, DecoderModel, read_model
from satchel.export.native import NativeFlavour
from satchel.export.package import FileRecord, Manifest, Package, TokenizerSettings
from satchel.export.sources import open_source
from satchel.export.spec import ExpertSpec, ModelSpec, RopeSpec
from satchel.runtime.engines import NativeEngine

torch = pytest.importorskip("torch", reason="needs the extra 'reference'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'reference'")
pytestmark = pytest.mark.filterwarnings("default")  # torch and transformers warn about themselves

Logits = NDArray[np.float32]
VOCAB, WINDOW = 160, 7
TOKENS, CHUNK = 45, 26  # two chunks, both longer than the window, then single tokens
ENDS = (CHUNK, TOKENS - 3, TOKENS - 2, TOKENS - 1, TOKENS)
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "attn_implementation": "eager",
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 5.0, 9.0],
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A configuration of a family. ``faults``: changes of the spec that must not go unnoticed."""

    kind: str  # transformers' name of its classes
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, Any] = field(default_factory=dict)
    seed: int = 1


NO_WINDOWS, ALL_WINDOWS = (0,) * 4, (WINDOW,) * 4
CASES: dict[str, Case] = {
    "llama": Case("Llama", "llama", {"tie_word_embeddings": False}, {"unrotated_layers": (2,)}),
    "llama with biases": Case("Llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": Case("Llama", "llama", {"rope_parameters": LLAMA3}, {"rope": RopeSpec(1e4, 16)}),
    "yarn": Case("Llama", "llama", {"rope_parameters": YARN}, {"rope": RopeSpec(1e4, 16)}),
    "mistral": Case(
        "Mistral", "llama", {"sliding_window": WINDOW, "head_dim": 32},
        {"attention_windows": NO_WINDOWS, "one more": {"attention_windows": (WINDOW + 1,) * 4}},
    ),
    "qwen2": Case("Qwen2", "qwen2", {}, {"attention_scale": 0.3}),
    "qwen2 with windows": Case(
        "Qwen2", "qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        {"attention_windows": ALL_WINDOWS, "no windows": {"attention_windows": NO_WINDOWS}},
    ),
    "qwen3": Case(
        "Qwen3", "qwen3", {"head_dim": 32, "rms_norm_eps": 0.05}, {"query_key_norm": "none", "norm_epsilon": 1e-6}
    ),
    "gemma2": Case(
        "Gemma2", "gemma2",
        {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "final_logit_softcapping": 20.0,
         "attn_logit_softcapping": 5.0},
        {"attention_windows": (0, WINDOW, 0, WINDOW), "attention_softcap": 0.0, "logits_softcap": 0.0,
         "activation": "silu", "norm_places": "pre", "embedding_multiplier": 1.0, "attention_scale": 32**-0.5},
    ),
    "gemma3": Case(
        "Gemma3Text", "gemma3",
        {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
         }},
        {"attention_windows": (WINDOW, WINDOW, WINDOW, 0), "window_rope": None, "activation": "silu",
         "query_key_norm": "none", "norm_places": "pre", "embedding_multiplier": 1.0, "attention_scale": 32**-0.5,
         "rope": RopeSpec(1e5, 32)},
    ),
    "granite": Case(
        "Granite", "granite",
        {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 3.0, "attention_multiplier": 0.15},
        {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_multiplier": 1.0, "attention_scale": 0.25},
    ),
    "granite with biases": Case(
        "Granite", "granite", {"residual_multiplier": 0.4, "attention_bias": True, "mlp_bias": True}
    ),
    "olmo2": Case(
        "Olmo2", "olmo2", {"tie_word_embeddings": False, "rms_norm_eps": 0.05},
        {"query_key_norm": "none", "norm_epsilon": 1e-6},
    ),
    "smollm3": Case(
        "SmolLM3", "smollm3", {"no_rope_layers": [1, 0, 1, 1], "use_sliding_window": False},
        {"unrotated_layers": (3,)},
    ),
    "phi3": Case(
        "Phi3", "phi3", {"sliding_window": WINDOW, "tie_word_embeddings": False},
        {"attention_windows": NO_WINDOWS},
    ),
    "phi3 with LongRoPE": Case(
        "Phi3", "phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
        {"rope": RopeSpec(1e4, 8), "all dimensions": {"rope": RopeSpec(1e4, 16)}},
    ),
    "phi3 with LongRoPE for its first context": Case(
        "Phi3", "phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
        {"rope": RopeSpec(1e4, 8, frequency_factors=(1.0, 2.0, 5.0, 9.0))},
    ),
    "qwen3moe": Case(
        "Qwen3Moe", "qwen3moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
         "head_dim": 32},
        {"query_key_norm": "none", "experts": ExpertSpec(6, 2, 64, normalized=False),
         "one expert": {"experts": ExpertSpec(6, 1, 64, normalized=True), "feed_forward": 64}},
        seed=2,  # with seed 1 two experts of a token are as good as equal (4e-5), and rounding decides
    ),
    "qwen3moe, plain weights": Case(
        "Qwen3Moe", "qwen3moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": False,
         "head_dim": 32},
    ),
}  # fmt: skip
LARGEST_ERROR = 1e-3  # of the logits' standard deviation


@pytest.fixture(scope="module", autouse=True)
def sixteen_bit_activations() -> Iterator[None]:
    before = kernels.active_variant()
    kernels.select_variant("baseline")
    yield
    kernels.select_variant(before)


def randomize(model: Any, seed: int) -> None:
    """8-bit weights of a scale that keeps activations near 1; uneven norms; attention that looks at few tokens."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            center = 0.0 if "Gemma" in type(model).__name__ or name.endswith("bias") else 1.0
            weight.data = center + torch.rand(weight.shape, generator=generator) - 0.5
            continue
        codes = (torch.randn(weight.shape, generator=generator) * 42).round().clamp(-127, 127)
        blocks = codes.view(-1, 32)  # each of them is to span the whole range
        blocks[:, 0] = torch.where(blocks[:, 0] < 0, -127.0, 127.0)
        wanted = {"qkv_proj": 1.5, "embed_tokens": 8.0}
        gain = next((value for part, value in wanted.items() if part in name), 1.0)
        weight.data = codes * 2.0 ** round(math.log2(gain / (45 * math.sqrt(weight.shape[-1]))))


def save_model(case: Case, folder: Path) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, case.kind + "Config")(**{**SMALL, **case.config})
    model = getattr(transformers, case.kind.removesuffix("Text") + "ForCausalLM")(config).float().eval()
    randomize(model, case.seed)
    model.tie_weights()
    model.save_pretrained(folder)
    return model


def export(source_path: Path, folder: Path, change: dict[str, Any] | None = None) -> Package:
    """The graph and its weights, without a tokenizer; ``change`` is a fault in the spec."""
    folder.mkdir()
    with open_source(source_path) as source:
        model = read_model(source)
        model = DecoderModel(replace(model.spec, **(change or {})), model.weights)
        flavour = NativeFlavour(model, source, 8)
        records = flavour.write(folder, lambda *_: None)
    assert all(record.rms_error < 1e-6 for record in records), "packing was to be exact"
    files = {path.name: FileRecord(path.stat().st_size, "") for path in folder.iterdir()}
    nothing = TokenizerSettings(kind="byte-level")
    manifest = Manifest(flavour.model.spec, nothing, "native", 8, "tiny", 0, "", 0, (), files)
    assert ModelSpec.from_json(json.loads(json.dumps(manifest.spec.to_json()))) == manifest.spec
    return Package(folder, manifest)


def our_logits(package: Package, ids: list[int]) -> Logits:
    engine = NativeEngine(package, threads=1)
    cache = KVCache(engine.cache_shape, CacheSettings(storage="fp32"), hot_tokens=None)
    try:
        rows = [engine.run(ids[first:end], cache) for first, end in zip((0, *ENDS), ENDS, strict=False)]
    finally:
        cache.close()
    return np.stack(rows)


def their_logits(model: Any, ids: list[int]) -> Logits:
    with torch.inference_mode():
        rows: Logits = model(torch.tensor([ids])).logits[0].numpy()
    return rows[[end - 1 for end in ENDS]]


def some_ids() -> list[int]:
    return [int(index) for index in np.random.default_rng(3).integers(3, VOCAB, TOKENS)]


def distance(ours: Logits, theirs: Logits) -> float:
    return float(np.abs(ours - theirs).max() / theirs.std())


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Path, Logits]]:
    """What `saved` has made: each model once."""
    return {}


@pytest.fixture
def saved(
    name: str, models: dict[str, tuple[Path, Logits]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Logits]:
    if name not in models:
        folder = tmp_path_factory.mktemp("model")
        models[name] = folder, their_logits(save_model(CASES[name], folder), some_ids())
    return models[name]


@pytest.mark.parametrize("name", CASES)
def test_the_same_logits(name: str, saved: tuple[Path, Logits], tmp_path: Path) -> None:
    source, theirs = saved
    package = export(source, tmp_path / "package")
    assert package.spec.architecture == CASES[name].architecture
    found = distance(our_logits(package, some_ids()), theirs)
    assert found <= LARGEST_ERROR, found


FAULTS = [(name, fault) for name, case in CASES.items() for fault in case.faults]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_fault_is_noticed(name: str, fault: str, saved: tuple[Path, Logits], tmp_path: Path) -> None:
    source, theirs = saved
    value = CASES[name].faults[fault]
    package = export(source, tmp_path / "package", value if isinstance(value, dict) else {fault: value})
    found = distance(our_logits(package, some_ids()), theirs)
    assert found > 10 * LARGEST_ERROR, found


def test_every_family_has_a_case() -> None:
    assert {case.architecture for case in CASES.values()} == set(ARCHITECTURES)


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    save_model(CASES["llama"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}), encoding="utf-8")
    with pytest.raises(ModelError, match="model_type 'mamba'.*supported are: .*gemma2"):
        open_source(tmp_path)
