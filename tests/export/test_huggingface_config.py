"""config.json in GGUF's keys, and tensors in GGUF's names: old and new spellings, family by family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from satchel.errors import ModelError
from satchel.export.architectures import read_model
from satchel.export.blocks import to_float
from satchel.export.rope import rope_frequencies
from satchel.export.sources import open_source
from satchel.export.sources.hf_config import FAMILIES, translate_config
from satchel.export.sources.hf_record import Record
from satchel.export.spec import RopeSpec
from tiny_folders import tiny_config, tiny_tensors, write_json, write_safetensors, write_tiny_folder

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
KINDS = {"s": "sliding_attention", "f": "full_attention"}
Expected = dict[str, Any]


def kinds(letters: str) -> list[str]:
    return [KINDS[letter] for letter in letters]


def windowed(letters: str) -> list[bool]:
    return [letter == "s" for letter in letters]


# what it shows -> (model_type, changes of the config, GGUF keys without the architecture's name: None for absent)
TRANSLATED: dict[str, tuple[str, dict[str, Any], Expected]] = {
    "the common keys": ("llama", {}, {
        "context_length": 512, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0,
        "rope.dimension_count": 16, "attention.sliding_window": None, "rope.scaling.type": None,
    }),
    "no key heads of its own": ("llama", {"num_key_value_heads": ...}, {"attention.head_count_kv": 4}),
    "null is absent": ("llama", {"num_key_value_heads": None, "head_dim": None}, {"attention.key_length": 16}),
    "wide heads": ("qwen2", {"head_dim": 32}, {"attention.key_length": 32, "rope.dimension_count": 32}),
    "qwen3 has heads of 128": ("qwen3", {}, {"attention.key_length": 128}),
    "a number of text lengths as a float": ("llama", {"max_position_embeddings": 512.0}, {"context_length": 512}),
    # positions
    "theta under rope_parameters": (
        "llama", {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope.freq_base": 5e5, "rope.scaling.type": None},
    ),
    "theta by default": ("llama", {"rope_theta": ...}, {"rope.freq_base": 10000.0}),
    "theta of smollm3 by default": ("smollm3", {"rope_theta": ...}, {"rope.freq_base": 2e6}),
    "rotation in part, old": ("phi3", {"partial_rotary_factor": 0.5}, {"rope.dimension_count": 8}),
    "rotation in part, new": ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, {"rope.dimension_count": 8}),
    "linear, old": (
        "llama", {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    ),
    "linear, new": (
        "llama", {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 2e4}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.freq_base": 2e4},
    ),
    "yarn": ("qwen2", {"rope_scaling": YARN}, {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
        "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0,
    }),
    "yarn, attention said": (
        "qwen2", {"rope_scaling": {**YARN, "attention_factor": 1.0, "beta_fast": 16}},
        {"rope.scaling.attn_factor": pytest.approx(1 / (0.1 * np.log(4) + 1)), "rope.scaling.yarn_beta_fast": 16.0},
    ),
    "yarn, both scales": (
        "qwen2", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope.scaling.attn_factor": pytest.approx(1 / (0.1 * np.log(4) + 1))},
    ),
    "longrope": (
        "phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 128},
        {"rope.scaling.original_context_length": 128,
         "rope.scaling.attn_factor": pytest.approx(np.sqrt(1 + np.log(4) / np.log(128)))},
    ),
    "longrope by its first name": (
        "phi3", {"rope_scaling": {**LONG, "rope_type": "su"}}, {"rope.scaling.attn_factor": 1.0},
    ),
    # windows
    "mistral": ("mistral", {"sliding_window": 128}, {
        "attention.sliding_window": 128, "attention.sliding_window_pattern": windowed("ss"),
    }),
    "mistral by default": ("mistral", {}, {"attention.sliding_window": 4096}),
    "mistral without": ("mistral", {"sliding_window": None}, {"attention.sliding_window": None}),
    "qwen2 that does not use it": ("qwen2", {"sliding_window": 128}, {"attention.sliding_window": None}),
    "qwen2 that says no": (
        "qwen2", {"sliding_window": 128, "use_sliding_window": False}, {"attention.sliding_window": None},
    ),
    "qwen2 from a layer on": (
        "qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1},
        {"attention.sliding_window": 128, "attention.sliding_window_pattern": windowed("fs")},
    ),
    "qwen2 from a layer that is not there": (
        "qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 9},
        {"attention.sliding_window": None},
    ),
    "kinds of layers": (
        "qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": kinds("sf")},
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": windowed("sf")},
    ),
    "gemma2": ("gemma2", {"num_hidden_layers": 4, "query_pre_attn_scalar": 144, "sliding_window": 64}, {
        "attention.sliding_window": 64, "attention.sliding_window_pattern": windowed("sfsf"), "attention.scale": 1 / 12,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.key_length": 256,
    }),
    "gemma2 without softcaps": (
        "gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0},
    ),
    "gemma3, old": (
        "gemma3_text", {"num_hidden_layers": 7, "rope_theta": 1e6, "sliding_window": 512, "sliding_window_pattern": 6},
        {"attention.sliding_window": 512, "attention.sliding_window_pattern": windowed("sssssfs"),
         "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.scale": 1 / 16, "final_logit_softcapping": 0.0},
    ),
    "gemma3, all windowed": (
        "gemma3_text", {"layer_types": kinds("ss")}, {"attention.sliding_window_pattern": windowed("ss")},
    ),
    "gemma3, none windowed": ("gemma3_text", {"layer_types": kinds("ff")}, {"attention.sliding_window": None}),
    "gemma3, new": (
        "gemma3_text",
        {"rope_theta": ..., "layer_types": kinds("sf"), "sliding_window": 512, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}},
        {"attention.sliding_window_pattern": windowed("sf"), "rope.freq_base": 2e6, "rope.freq_base_swa": 2e4,
         "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "gemma3 that sees": (
        "gemma3", {"text_config": {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}},
        {"embedding_length": 128, "attention.head_count": 8, "attention.key_length": 256, "context_length": 131072,
         "attention.sliding_window": 4096},
    ),
    # what families have of their own
    "smollm3": ("smollm3", {"num_hidden_layers": 5}, {"rope.layers": [True, True, True, False, True]}),
    "smollm3, said": ("smollm3", {"no_rope_layers": [0, 1]}, {"rope.layers": [False, True]}),
    "smollm3, all": ("smollm3", {"no_rope_layers": [1, 1]}, {"rope.layers": [True, True]}),
    "granite": (
        "granite",
        {"embedding_multiplier": 12, "residual_multiplier": 0.22, "logits_scaling": 8, "attention_multiplier": 0.1},
        {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0, "attention.scale": 0.1},
    ),
    "qwen3_moe": (
        "qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32, "expert_weights_norm": True},
    ),
    "qwen3_moe, other spelling": (
        "qwen3_moe", {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        {"expert_count": 8, "expert_weights_norm": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSLATED)
def test_a_config_in_keys(case: str) -> None:
    kind, changes, wanted = TRANSLATED[case]
    activation = "gelu_pytorch_tanh" if kind.startswith("gemma") else "silu"
    values = tiny_config(kind, **{"hidden_activation": activation, **changes})
    found = translate_config(Record(values, Path("config.json")), "m").metadata
    prefix = FAMILIES[kind].architecture
    assert found["general.architecture"] == prefix
    for key, value in wanted.items():
        assert found.get(f"{prefix}.{key}") == value, key
    known = {text for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope) for text in vars(group).values()}
    ours = {"{arch}.rope.layers"}
    assert {key.replace(prefix, "{arch}", 1) for key in found if not key.startswith("general.")} <= known | ours


# what a setting is -> (model_type, changes, what the message says)
UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "both directions": ("gemma3_text", {"use_bidirectional_attention": True}, "has use_bidirectional_attention True"),
    "layers without experts": (
        "qwen3_moe", {"mlp_only_layers": [0]}, r"has mlp_only_layers \[0\]; supported for qwen3moe: \[\]",
    ),
    "every second layer with experts": ("qwen3_moe", {"decoder_sparse_step": 2}, "has decoder_sparse_step 2"),
    "gelu of another kind": ("gemma2", {"hidden_activation": "gelu"}, "has hidden_activation 'gelu'"),
    "windowed layers with scaling": (
        "gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": LLAMA3}},
        "scaled rotary positions in its windowed layers",
    ),
    "yarn without cutting": ("qwen2", {"rope_scaling": {**YARN, "truncate": False}}, "YaRN with truncate false"),
    "llama3 upside down": ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor 0.5"),
    "windows without a width": ("llama", {"layer_types": kinds("sf")}, "has layer_types .* but no sliding_window"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_setting_that_is_not_supported(case: str) -> None:
    kind, changes, message = UNSUPPORTED[case]
    values = tiny_config(kind, **{"hidden_activation": "gelu_pytorch_tanh", **changes})
    with pytest.raises(ModelError, match=message) as error:
        translate_config(Record(values, Path("config.json")), "m")
    assert str(error.value).startswith("config.json ")


def test_llama3_scaling_is_what_its_definition_says(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path, config={"rope_scaling": LLAMA3})
    with open_source(folder) as source:
        found = rope_frequencies(read_model(source).spec.rope)
    wanted = rope_frequencies(RopeSpec(1e4, 16, "llama3", 8.0, 64, low_frequency_factor=1.0, high_frequency_factor=4.0))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert not np.allclose(found, rope_frequencies(RopeSpec(1e4, 16)))


def test_the_norms_of_gemma_get_their_one(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path, dtype="BF16")
    with open_source(folder) as source:
        plain = source.tensors["blk.1.attn_norm.weight"]
        wanted = to_float(plain.read_rows(0, 1), "BF16") + 1
        matrix = source.tensors["blk.1.attn_q.weight"].read_rows(0, 64)
    write_json(folder / "config.json", tiny_config("gemma3_text", head_dim=16))
    with open_source(folder) as source:
        for name in ("blk.1.attn_norm.weight", "output_norm.weight"):
            assert source.tensors[name].type_name == "F32"
        norm = source.tensors["blk.1.attn_norm.weight"]
        np.testing.assert_array_equal(norm.read_rows(0, 1).view(np.float32), wanted)
        assert (norm.size, norm.row_bytes) == (256, 256)
        np.testing.assert_array_equal(source.tensors["blk.1.attn_q.weight"].read_rows(0, 64), matrix)


def expert_tensors(count: int) -> dict[str, Any]:
    """The experts of one layer by their names, [rows, columns] filled with 10 · expert + matrix."""
    found = {}
    for expert in range(count):
        for index, (name, shape) in enumerate((("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32)))):
            values = np.full(shape, 10 * expert + index, np.float32)
            found[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] = values
    return found


def moe_folder(folder: Path, experts: dict[str, Any]) -> Path:
    write_tiny_folder(folder)
    write_json(
        folder / "config.json",
        tiny_config("qwen3_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
    )
    kept = {name: values for name, values in tiny_tensors().items() if ".mlp." not in name}
    write_safetensors(folder / "model.safetensors", {**kept, **experts})
    return folder


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "in one tensor"])
def test_experts_are_stacked(fused: bool, tmp_path: Path) -> None:
    experts = expert_tensors(3)
    if fused:
        at = "model.layers.0.mlp.experts"
        parts = {name: [experts[f"{at}.{e}.{name}_proj.weight"] for e in range(3)] for name in ("gate", "up", "down")}
        experts = {
            f"{at}.gate_up_proj": np.concatenate([np.stack(parts["gate"]), np.stack(parts["up"])], axis=1),
            f"{at}.down_proj": np.stack(parts["down"]),
        }
    with open_source(moe_folder(tmp_path, experts)) as source:
        for index, (name, shape) in enumerate((("gate", (3, 32, 64)), ("up", (3, 32, 64)), ("down", (3, 64, 32)))):
            tensor = source.tensors[f"blk.0.ffn_{name}_exps.weight"]
            assert tensor.shape == shape
            assert tensor.row_bytes == 4 * shape[-1]
            for start, stop in ((0, tensor.rows), (30, 34), (63, 65), (tensor.rows - 1, tensor.rows)):
                found = tensor.read_rows(start, stop).view(np.float32)
                assert found.shape == (stop - start, shape[-1])
                wanted = [10 * (row // shape[1]) + index for row in range(start, stop)]
                assert found[:, 0].tolist() == wanted
                assert found[:, -1].tolist() == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda experts: experts.pop("model.layers.0.mlp.experts.1.up_proj.weight"), "lacks expert 1 of blk.0.ffn_up"),
        (
            lambda experts: experts.update({"model.layers.0.mlp.experts.2.up_proj.weight": np.ones((8, 4), "f4")}),
            "experts 0 and 2 of blk.0.ffn_up_exps.weight differ",
        ),
        (
            lambda experts: experts.update({"model.layers.0.mlp.experts.down_proj": np.ones((3, 64, 32), np.float32)}),
            "both expert by expert and as one tensor",
        ),
    ],
)
def test_experts_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    experts = expert_tensors(3)
    change(experts)
    with pytest.raises(ModelError, match=message):
        open_source(moe_folder(tmp_path, experts))


# --- against the folders that transformers writes ---

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "pad_token_id": 0, "head_dim": 32,
}  # fmt: skip
# model_type -> what its config needs beside the sizes
WRITTEN: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in FAMILIES if kind != "gemma3"},
    "phi3": {"head_dim": None},
    "granite": {"head_dim": None},
    "olmo2": {"head_dim": None},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}
OPTIONAL = {  # GGUF names that only some files of a family have
    "output", "rope_freqs", "rope_factors_long", "rope_factors_short", "blk.N.attn_rot_embd", "blk.N.ffn_gate_inp",
    "blk.N.ffn_gate_exps", "blk.N.ffn_up_exps", "blk.N.ffn_down_exps", "blk.N.attn_q", "blk.N.attn_k", "blk.N.attn_v",
}  # fmt: skip


@pytest.mark.filterwarnings("default")  # torch and transformers warn about themselves
@pytest.mark.parametrize("kind", WRITTEN)
def test_every_tensor_that_transformers_writes_has_its_gguf_name(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'reference'")
    pytest.importorskip("torch", reason="needs the extra 'reference'")
    sizes = {key: value for key, value in {**SIZES, **WRITTEN[kind]}.items() if value is not None}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with open_source(tmp_path) as source:
        found = {re.sub(r"^blk\.\d+", "blk.N", name).rsplit(".", 1)[0] for name in source.tensors}
        family = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == source.architecture)
    wanted = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "N") for tensor in gguf.MODEL_TENSORS[family]}
    assert found <= wanted
    assert wanted - found <= OPTIONAL
