"""Real exports of Optimum beside the safetensors that they were made from: the same weights, the same logits?

Exports need an environment of their own, because ``optimum-onnx`` pins an older ``transformers``:

    python -m venv /tmp/optimum && /tmp/optimum/bin/pip install torch optimum-onnx onnxruntime accelerate gguf onnxslim
    /tmp/optimum/bin/python benchmarks/optimum_folders.py make /tmp/folders
    python benchmarks/optimum_folders.py compare /tmp/folders

``make`` writes NAME/hf, NAME/onnx and what ``transformers`` computes (NAME/logits.npy) for each row of MODELS;
``compare`` exports both folders and prints a line of JSON for each, and exits with 1 where they are not one model.
torch 2.13 cannot export bfloat16: ``ScalarType ComplexDouble is an unexpected tensor scalar type``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
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
IDS = np.random.default_rng(0).integers(0, 256, 90)
LAYERS = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
# name -> (model_type, what its config has beyond SMALL, arguments of main_export)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}, {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama-biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, {}),
    "llama-no-past": ("llama", {"tie_word_embeddings": True}, {"task": "text-generation"}),
    "llama-fp16": ("llama", {"tie_word_embeddings": True}, {"dtype": "fp16"}),
    "llama-alike": ("llama", {"attention_bias": True}, {}),
    "llama-alike-unfolded": ("llama", {"attention_bias": True}, {"do_constant_folding": False}),
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
    "gemma3-alike": ("gemma3_text", {**GEMMA, "layer_types": LAYERS}, {"do_constant_folding": False}),
    "gemma3-unfolded": ("gemma3_text", {**GEMMA, "layer_types": LAYERS}, {"do_constant_folding": False}),
    "gemma2": ("gemma2", {**GEMMA, "num_hidden_layers": 2}, {}),
    "phi3": ("phi3", {"sliding_window": None, "tie_word_embeddings": False}, {}),
    "smollm3": ("smollm3", {"use_sliding_window": False, "num_hidden_layers": 4}, {}),
    "granite": ("granite", {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 3.0,
                            "attention_multiplier": 0.15}, {}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}, {}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                                "norm_topk_prob": True, "head_dim": 32}, {}),
}  # fmt: skip


def save_model(folder: Path, kind: str, more: dict[str, Any], spread: int) -> None:
    """A seeded random model whose matrices 8-bit blocks (and float16) hold exactly; vectors differ by ``spread``."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(HELPERS))
    from tiny_folders import CHAT_TEMPLATE, tiny_tokenizer, write_json

    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            shape = tuple(weight.shape)
            if len(shape) == 1:
                center = 0 if kind.startswith("gemma") or name.endswith("bias") else 64
                values = (center + rng.integers(-spread, spread + 1, shape)) / 64
            else:
                codes = np.clip(np.rint(rng.normal(0, 42, (*shape[:-1], shape[-1] // 32, 32))), -127, 127)
                codes[..., 0] = 127
                gain = 8.0 if "embed_tokens" in name else 1.0
                values = (codes * 2.0 ** round(np.log2(gain / (45 * np.sqrt(shape[-1]))))).reshape(shape)
            weight.copy_(torch.from_numpy(values.astype(np.float32)))
        model.tie_weights()
        np.save(folder.parent / "logits.npy", model.eval()(torch.from_numpy(IDS)[None]).logits[0].numpy())
    model.save_pretrained(folder)
    write_json(folder / "tokenizer.json", tiny_tokenizer())
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", {**tokens, "chat_template": CHAT_TEMPLATE})


def make(name: str, out: Path) -> None:
    """Both folders of one row."""
    from optimum.exporters.onnx import main_export
    from optimum.onnx import merge_decoders

    kind, more, arguments = MODELS[name]
    save_model(out / "hf", kind, more, 0 if "alike" in name else 16)  # torch keeps one of equal tensors
    # as if there were more than 2 GB of weights
    os.environ["FORCE_ONNX_EXTERNAL_DATA"] = "1" if name == "llama-external" else "0"
    arguments = {"task": "text-generation-with-past", "do_validation": False, **arguments}
    main_export(str(out / "hf"), output=out / "onnx", **arguments)
    if name == "llama-merged":  # what Optimum made of two graphs before one could do without a past
        graph = out / "onnx" / "model.onnx"
        merge_decoders(graph, graph, save_path=out / "onnx" / "decoder_model_merged.onnx")
        graph.unlink()


def compare(folder: Path) -> dict[str, Any]:
    """Both folders as packages: whether they are equal, and how far their logits are from torch's, relative."""
    import satchel
    from satchel.export.exporter import export_model

    sys.path.insert(0, str(HELPERS))
    from reference_model import reference_from_package

    wanted = np.load(folder / "logits.npy")
    spread = float(np.ptp(wanted))
    with tempfile.TemporaryDirectory() as scratch:
        theirs, ours = (export_model(folder / name, Path(scratch) / name) for name in ("hf", "onnx"))
        logits = reference_from_package(ours.folder).logits(IDS.tolist())
        with satchel.load(ours.folder, kv={"storage": "fp32"}, cache_dir=Path(scratch) / "cache") as model:
            last = model.last_logits(IDS.tolist())
        return {
            "equal": ours.data_file.read_bytes() == theirs.data_file.read_bytes(),
            "reference": round(float(np.abs(logits - wanted).max()) / spread, 9),
            "native": round(float(np.abs(last - wanted[-1]).max()) / spread, 6),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME", help="only these rows")
    arguments = parser.parse_args()
    failed = False
    for name in arguments.names:
        try:
            if arguments.action == "make":
                make(name, arguments.folder / name)
                row: dict[str, Any] = {"name": name, "made": True}
            else:
                row = {"name": name, **compare(arguments.folder / name)}
                failed |= not (row["equal"] and row["reference"] <= 1e-4 and row["native"] <= 1e-2)
        except Exception as error:  # Optimum cannot export every family with every version
            row, failed = {"name": name, "failed": f"{type(error).__name__}: {error}"[:300]}, True
        print(json.dumps(row), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
