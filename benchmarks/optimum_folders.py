"""Makes tiny models as safetensors folders and as what Optimum exports from them: the two sources to compare.

Run it in an environment of its own, because ``optimum-onnx`` pins an older ``transformers``:

    python -m venv /tmp/optimum && /tmp/optimum/bin/pip install torch optimum-onnx onnxruntime accelerate gguf onnxslim
    /tmp/optimum/bin/python benchmarks/optimum_folders.py /tmp/folders

writes /tmp/folders/NAME/hf and /tmp/folders/NAME/onnx for each row of MODELS (some minutes on one core).
``SATCHEL_OPTIMUM_FOLDERS=/tmp/folders pytest tests/export/test_optimum_parity.py`` compares them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

HELPERS = Path(__file__).resolve().parents[1] / "tests" / "helpers"
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 266, "eos_token_id": 268,
    "pad_token_id": 266,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32, "num_hidden_layers": 7,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
LAYERS = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
# name -> (model_type, what its config has beyond SMALL, arguments of main_export)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}, {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama-biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, {}),
    "llama-no-past": ("llama", {"tie_word_embeddings": True}, {"task": "text-generation"}),
    "llama-fp16": ("llama", {"tie_word_embeddings": True}, {"dtype": "fp16"}),
    "llama-bf16": ("llama", {"tie_word_embeddings": False}, {"dtype": "bf16"}),
    "llama-external": ("llama", {"tie_word_embeddings": True}, {}),
    "llama-merged": ("llama", {"tie_word_embeddings": True}, {}),
    "llama-raw": ("llama", {"tie_word_embeddings": True}, {"no_post_process": True}),
    "llama-unfolded": ("llama", {"tie_word_embeddings": True}, {"do_constant_folding": False}),
    "llama-slim": ("llama", {"tie_word_embeddings": True}, {"slim": True}),
    "llama-O1": ("llama", {"tie_word_embeddings": False}, {"optimize": "O1"}),
    "llama-O2": ("llama", {"tie_word_embeddings": False}, {"optimize": "O2"}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 32}, {}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}, {}),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": LAYERS}, {}),
    "gemma3-fp16": ("gemma3_text", {**GEMMA, "layer_types": LAYERS}, {"dtype": "fp16"}),
    "gemma3-unfolded": ("gemma3_text", {**GEMMA, "layer_types": LAYERS}, {"do_constant_folding": False}),
    "phi3": ("phi3", {"sliding_window": None, "tie_word_embeddings": False}, {}),
    "smollm3": ("smollm3", {"use_sliding_window": False, "num_hidden_layers": 4}, {}),
    "granite": ("granite", {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 3.0,
                            "attention_multiplier": 0.15}, {}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}, {}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                                "norm_topk_prob": True, "head_dim": 32}, {}),
}  # fmt: skip


def save_model(folder: Path, kind: str, more: dict[str, Any]) -> None:
    """A seeded random model whose matrices 8-bit blocks (and bfloat16, float16) hold exactly."""
    import torch
    import transformers

    sys.path.insert(0, str(HELPERS))
    from tiny_folders import CHAT_TEMPLATE, tiny_tokenizer, write_json

    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            shape = tuple(weight.shape)
            if len(shape) == 1:
                center = 0 if kind.startswith("gemma") or name.endswith("bias") else 64
                values = (center + rng.integers(-16, 16, shape)) / 64
            else:
                codes = np.clip(np.rint(rng.normal(0, 42, (*shape[:-1], shape[-1] // 32, 32))), -127, 127)
                codes[..., 0] = 127
                gain = 8.0 if "embed_tokens" in name else 1.0
                values = (codes * 2.0 ** round(np.log2(gain / (45 * np.sqrt(shape[-1]))))).reshape(shape)
            weight.copy_(torch.from_numpy(values.astype(np.float32)))
    model.tie_weights()
    model.save_pretrained(folder)
    write_json(folder / "tokenizer.json", tiny_tokenizer())
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", {**tokens, "chat_template": CHAT_TEMPLATE})


def make(name: str, out: Path) -> None:
    """Both folders of one row."""
    from optimum.exporters.onnx import main_export
    from optimum.onnx import merge_decoders

    kind, more, arguments = MODELS[name]
    save_model(out / "hf", kind, more)
    # as if there were more than 2 GB of weights
    os.environ["FORCE_ONNX_EXTERNAL_DATA"] = "1" if name == "llama-external" else "0"
    arguments = {"task": "text-generation-with-past", "do_validation": False, **arguments}
    main_export(str(out / "hf"), output=out / "onnx", **arguments)
    if name == "llama-merged":  # what Optimum before 1.14 made of the two graphs, by what it still has for others
        main_export(str(out / "hf"), output=out / "first", **{**arguments, "task": "text-generation"})
        graph = out / "onnx" / "model.onnx"
        merged = out / "onnx" / "decoder_model_merged.onnx"
        merge_decoders(out / "first" / "model.onnx", graph, strict=False, save_path=merged)
        graph.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME", help="only these rows")
    arguments = parser.parse_args()
    for name in arguments.names:
        try:
            make(name, arguments.out / name)
            print("made", name, flush=True)
        except Exception as error:  # Optimum cannot export every family with every version
            print("not made", name, f"{type(error).__name__}: {error}"[:300], flush=True)


if __name__ == "__main__":
    main()
