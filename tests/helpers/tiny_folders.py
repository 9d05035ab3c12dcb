"""Tiny seeded models as Hugging Face folders, written byte by byte: tests need neither torch nor safetensors.

The weights are those that ``write_tiny_gguf`` writes for the same seed and sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_models import CHAT_TEMPLATE, CONTROL_TOKENS, MERGES, tiny_vocabulary, tiny_weights

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
SIZES = {
    "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_size": 16, "feed_forward": 96, "vocab": 300,
}  # fmt: skip
BYTES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
Floats = npt.NDArray[np.float32]


def encode(values: Floats, dtype: str) -> bytes:
    """float32 in one of safetensors' float types; bfloat16 by cutting."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype(BYTES[dtype]).tobytes()


def safetensors_bytes(header: Any, data: bytes) -> bytes:
    """A file of a header (JSON, or bytes as they are) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_safetensors(path: Path, tensors: Mapping[str, Floats], dtype: str = "F32") -> Path:
    """Writes ``tensors``, all as ``dtype``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        raw = encode(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    path.write_bytes(safetensors_bytes(header, data))
    return path


def hugging_face_name(name: str) -> str:
    """The name in a llama or qwen2 folder of a tensor that GGUF calls ``name``."""
    if name in NAMES:
        return NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def tiny_tensors(
    kind: str = "llama", seed: int = 0, *, tied: bool = True, biases: bool | None = None
) -> dict[str, Floats]:
    """The tensors of a llama or qwen2 folder, by their names there."""
    has_biases = kind == "qwen2" if biases is None else biases
    return {
        hugging_face_name(name): values
        for name, values in tiny_weights(seed=seed, **SIZES).items()
        if (has_biases or not name.endswith(".bias")) and not (tied and name == "output.weight")
    }


def tiny_config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json in the spelling before transformers 5; a change to ... takes the key out."""
    config = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "vocab_size": 300, "bos_token_id": 266, "eos_token_id": 268,
        "torch_dtype": "float32", **changes,
    }  # fmt: skip
    return {key: value for key, value in config.items() if value is not ...}


def tiny_tokenizer(vocab: int = 300) -> dict[str, Any]:
    """A byte-level tokenizer.json with the vocabulary of the tiny GGUF files."""
    tokens, _ = tiny_vocabulary(vocab)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": tokens.index(name), "content": name, **flags} for name in CONTROL_TOKENS],
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in MERGES],
        },
    }  # fmt: skip


def write_tiny_folder(
    folder: Path, kind: str = "llama", seed: int = 0, *, dtype: str = "F32", tied: bool = True,
    biases: bool | None = None, shards: int = 1, config: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Writes a whole model folder and returns it; ``config``: other values of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tiny_tensors(kind, seed, tied=tied, biases=biases)
    write_weights(folder, tensors, dtype=dtype, shards=shards)
    changes = {"tie_word_embeddings": tied, **(config or {})}
    write_json(folder / "config.json", tiny_config(kind, **changes))
    write_json(folder / "tokenizer.json", tiny_tokenizer())
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    write_json(folder / "tokenizer_config.json", {**tokens, "chat_template": CHAT_TEMPLATE})
    write_json(folder / "generation_config.json", {"eos_token_id": [268, 266]})
    return folder


def write_weights(folder: Path, tensors: Mapping[str, Floats], *, dtype: str = "F32", shards: int = 1) -> None:
    """One file, or several with an index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    names: Sequence[str] = list(tensors)
    places = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        mine = names[index::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in mine}, dtype)
        places |= dict.fromkeys(mine, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": places})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
