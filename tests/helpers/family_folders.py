"""Tiny models of every family as Hugging Face folders, made by ``transformers`` from seeded random weights.

Matrices are 8-bit numbers times a power of two, the first of each block of 32 being 127: Q8_0 and our packages hold
them exactly, so that all who read them compute with the same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_folders import CHAT_TEMPLATE, tiny_tokenizer, write_json

VOCAB, WINDOW = 300, 24
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 266, "eos_token_id": 268,
    "pad_token_id": 266,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SLIDING, FULL = "sliding_attention", "full_attention"
# name -> (model_type, what its config has beyond SMALL)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3moe": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
         "head_dim": 32},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32, "final_logit_softcapping": 20.0,
         "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32, "num_hidden_layers": 7,
         "layer_types": [SLIDING] * 5 + [FULL, SLIDING], "rope_parameters": GEMMA3_ROPE},
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 3.0, "attention_multiplier": 0.15},
    ),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "olmo2, output tied": ("olmo2", {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"use_sliding_window": False}),
    "phi3": ("phi3", {"sliding_window": None, "tie_word_embeddings": False}),
}  # fmt: skip


def _weights(name: str, shape: tuple[int, ...], rng: np.random.Generator, gemma: bool) -> Any:
    if len(shape) == 1:
        center = 0.0 if gemma or name.endswith("bias") else 1.0
        return (center + rng.uniform(-0.4, 0.4, shape)).astype(np.float32)
    codes = np.clip(np.rint(rng.normal(0, 42, (*shape[:-1], shape[-1] // 32, 32))), -127, 127)
    codes[..., 0] = np.where(codes[..., 0] < 0, -127, 127)
    gain = next((value for part, value in {"qkv_proj": 1.5, "embed_tokens": 8.0}.items() if part in name), 1.0)
    step = 2.0 ** round(np.log2(gain / (45 * np.sqrt(shape[-1]))))
    return (codes * step).reshape(shape).astype(np.float32)


def write_family_folder(folder: Path, name: str, seed: int = 1, **changes: Any) -> Path:
    """Writes the model's folder with the tiny byte-level tokenizer and returns it; ``changes``: of its config."""
    torch = pytest.importorskip("torch", reason="needs the extra 'reference'")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'reference'")
    kind, more = FAMILIES[name]
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **more, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(_weights(key, tuple(weight.shape), rng, kind.startswith("gemma"))))
    model.tie_weights()
    model.save_pretrained(folder)
    write_json(folder / "tokenizer.json", tiny_tokenizer())
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    write_json(folder / "tokenizer_config.json", {**tokens, "chat_template": CHAT_TEMPLATE})
    return folder
