"""Tiny seeded models in GGUF, so that tests need neither network nor gigabytes.

``write_tiny_gguf(path)`` writes a whole model of about 100 KB: random weights, a byte-level vocabulary that
encodes any text, control tokens and a chat template. The same seed gives the same weights whatever the
architecture and types, so that two files can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "Ġ t", "Ġ a", "i n", "e r", "Ġ the", "Ġ 1", "o n", "r e")
MIXED_TYPES = ("Q5_0", "Q8_0", "Q4_1", "F16", "Q4_0", "Q5_1", "BF16")
NORMAL, CONTROL, UNUSED = 1, 3, 5
# where the float16 factors of a K-quant's super-block lie
K_QUANT_HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}

Floats = npt.NDArray[np.float32]


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def tiny_vocabulary(vocab: int) -> tuple[list[str], list[int]]:
    """(tokens, token types): 256 bytes, the results of ``MERGES``, control tokens, and unused ones up to
    ``vocab``.
    """
    tokens = byte_letters() + [merge.replace(" ", "") for merge in MERGES]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(CONTROL_TOKENS)
    tokens += CONTROL_TOKENS
    if vocab < len(tokens):
        raise ValueError(f"a tiny vocabulary has at least {len(tokens)} tokens, not {vocab}")
    types += [UNUSED] * (vocab - len(tokens))
    tokens += [f"[UNUSED{index}]" for index in range(vocab - len(tokens))]
    return tokens, types


def random_blocks(type_name: str, rows: int, columns: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Random weights of any GGML block type as raw bytes: every bit random, the factors of ordinary size."""
    kind = gguf.GGMLQuantizationType[type_name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if type_name not in K_QUANT_HALVES:
        values = rng.normal(0, 0.05, (rows, columns)).astype(np.float32)
        return gguf.quantize(values, kind).view(np.uint8).reshape(rows, -1)
    raw = rng.integers(0, 256, (rows, columns // block, block_bytes), dtype=np.uint8)
    for offset in K_QUANT_HALVES[type_name]:
        factors = rng.uniform(0.2, 1.0, (rows, columns // block, 1)) * (2e-5 if type_name == "Q6_K" else 2e-4)
        raw[:, :, offset : offset + 2] = factors.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def interleave_heads(weight: Floats, heads: int) -> Floats:
    """Rows from half-split RoPE order to the interleaved order of llama.cpp's ``llama`` files."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tiny_weights(
    *,
    seed: int,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    feed_forward: int,
    vocab: int,
) -> dict[str, Floats]:
    """float32 weights under GGUF names, rows in half-split order; sized so that attention and logits are
    lively.
    """
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Floats:
        return rng.normal(0, gain / np.sqrt(columns), (rows, columns)).astype(np.float32)

    def vector(size: int, mean: float, spread: float) -> Floats:
        return (mean + spread * rng.normal(size=size)).astype(np.float32)

    weights = {"token_embd.weight": matrix(vocab, hidden, 8.0)}
    for layer in range(layers):
        at = f"blk.{layer}."
        for name, rows, columns, gain in (
            ("attn_q", heads * head_size, hidden, 2.0), ("attn_k", kv_heads * head_size, hidden, 2.0),
            ("attn_v", kv_heads * head_size, hidden, 1.0), ("attn_output", hidden, heads * head_size, 1.0),
            ("ffn_gate", feed_forward, hidden, 1.0), ("ffn_up", feed_forward, hidden, 1.0),
            ("ffn_down", hidden, feed_forward, 1.0),
        ):  # fmt: skip
            weights[f"{at}{name}.weight"] = matrix(rows, columns, gain)
            if name in ("attn_q", "attn_k", "attn_v"):
                weights[f"{at}{name}.bias"] = vector(rows, 0.0, 0.3)
        weights[at + "attn_norm.weight"] = vector(hidden, 1.0, 0.2)
        weights[at + "ffn_norm.weight"] = vector(hidden, 1.0, 0.2)
    weights["output_norm.weight"] = vector(hidden, 1.0, 0.2)
    weights["output.weight"] = matrix(vocab, hidden, 4.0)
    return weights


EXPERTS, EXPERTS_USED, EXPERT_WIDTH = 4, 2, 64
INTERLEAVED = ("llama", "granite", "smollm3")  # as llama.cpp's converter has them
# what the files of a family say beyond the common keys
FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "gemma2": {".attention.sliding_window": 24, ".attn_logit_softcapping": 8.0, ".final_logit_softcapping": 12.0},
    "gemma3": {".attention.sliding_window": 24, ".rope.freq_base": 1e6, ".attention.sliding_window_pattern": 2},
    "granite": {
        ".embedding_scale": 6.0, ".residual_scale": 0.4, ".logit_scale": 3.0, ".attention.scale": 0.15,
    },
    "phi3": {".attention.sliding_window": 40, ".rope.dimension_count": 8},
    "qwen3moe": {
        ".expert_count": EXPERTS, ".expert_used_count": EXPERTS_USED, ".expert_feed_forward_length": EXPERT_WIDTH,
    },
}  # fmt: skip


def family_weights(weights: Mapping[str, Floats], architecture: str, head_size: int) -> dict[str, Floats]:
    """Llama's tensors in the names and forms of another family, with norms and experts of its own."""
    rng = np.random.default_rng(7)
    found: dict[str, Floats] = {}

    def vector(size: int) -> Floats:
        return (1.0 + 0.2 * rng.normal(size=size)).astype(np.float32)

    for name, values in weights.items():
        at, part = name.rsplit(".", 2)[0] + ".", name.rsplit(".", 2)[1]
        if architecture == "olmo2" and part in ("attn_norm", "ffn_norm"):
            name = at + {"attn_norm": "post_attention_norm", "ffn_norm": "post_ffw_norm"}[part] + ".weight"
        elif architecture in ("gemma2", "gemma3") and part in ("attn_norm", "ffn_norm"):
            post = {"attn_norm": "post_attention_norm", "ffn_norm": "post_ffw_norm"}[part]
            found[f"{at}{post}.weight"] = vector(values.size)
        if name.endswith(".weight") and part in ("attn_q", "attn_k"):
            if architecture in ("gemma3", "qwen3", "qwen3moe"):
                found[f"{at}{part}_norm.weight"] = vector(head_size)
            elif architecture == "olmo2":
                found[f"{at}{part}_norm.weight"] = vector(len(values))
        if architecture == "phi3" and name.endswith(".weight"):
            pieces = {"attn_q": ("attn_q", "attn_k", "attn_v"), "ffn_gate": ("ffn_gate", "ffn_up")}
            if part in ("attn_k", "attn_v", "ffn_up"):
                continue
            if part in pieces:
                name = at + {"attn_q": "attn_qkv", "ffn_gate": "ffn_up"}[part] + ".weight"
                values = np.concatenate([weights[f"{at}{piece}.weight"] for piece in pieces[part]])
        if architecture == "qwen3moe" and part in ("ffn_gate", "ffn_up", "ffn_down"):
            rows, columns = (values.shape[0], EXPERT_WIDTH) if part == "ffn_down" else (EXPERT_WIDTH, values.shape[1])
            if part == "ffn_gate":
                found[at + "ffn_gate_inp.weight"] = rng.normal(0, 0.3, (EXPERTS, columns)).astype(np.float32)
            name = f"{at}{part}_exps.weight"
            values = rng.normal(0, 1 / np.sqrt(columns), (EXPERTS, rows, columns)).astype(np.float32)
        found[name] = values
    return found


def write_tiny_gguf(
    path: Path,
    architecture: str = "qwen2",
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int | None = None,
    feed_forward: int = 96,
    vocab: int = 300,
    context_length: int = 512,
    types: Sequence[str] = MIXED_TYPES,
    embedding_type: str = "Q8_0",
    output: str = "tied",
    biases: bool | None = None,
    rope_factors: Sequence[float] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a tiny model and returns ``path``.

    Args:
        types: GGML types of the layers' matrices, used in turn. Block types of 256 columns need such sizes
            and get random bits.
        output: ``tied`` (no output matrix), ``twice`` (the embedding again, as Q8_0) or ``separate``.
        biases: of query, key and value; by default what the architecture has.
        rope_factors: head_size/2 divisors of the RoPE frequencies, as Llama 3 files carry them.
        metadata: further keys, or other values of those above; a leading dot stands for the architecture.
    """
    size = head_size or hidden // heads
    weights = tiny_weights(
        seed=seed, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_size=size,
        feed_forward=feed_forward, vocab=vocab,
    )  # fmt: skip
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"tiny {architecture}")
    writer.add_block_count(layers)
    writer.add_context_length(context_length)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if head_size is not None:
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    _add_vocabulary(writer, vocab)
    for key, value in {**FAMILY_KEYS.get(architecture, {}), **(metadata or {})}.items():
        _add_value(writer, architecture + key if key.startswith(".") else key, value)
    if output == "tied":
        del weights["output.weight"]
    elif output == "twice":
        weights["output.weight"] = weights["token_embd.weight"]
    if rope_factors:
        weights["rope_freqs.weight"] = np.asarray(rope_factors, np.float32)
    if biases is None:
        biases = architecture == "qwen2"
    weights = family_weights(weights, architecture, size)
    _add_tensors(writer, weights, architecture, (heads, kv_heads), types, embedding_type, biases, seed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    for pairs in writer.kv_data:
        pairs.pop(key, None)
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_vocabulary(writer: gguf.GGUFWriter, vocab: int) -> None:
    tokens, types = tiny_vocabulary(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensors(
    writer: gguf.GGUFWriter, weights: Mapping[str, Floats], architecture: str, heads: tuple[int, int],
    types: Sequence[str], embedding_type: str, biases: bool, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed + 1)
    linears = 0
    for name, plain in weights.items():
        if name.endswith(".bias") and not biases:
            continue
        values = plain
        if architecture in INTERLEAVED and ("attn_q" in name or "attn_k" in name):
            values = interleave_heads(plain, heads["attn_k" in name])
        if values.ndim == 1:
            writer.add_tensor(name, values)
            continue
        if name == "token_embd.weight":
            type_name = embedding_type
        elif name == "output.weight":
            type_name = "Q8_0"
        else:
            type_name = types[linears % len(types)]
            linears += 1
        kind = gguf.GGMLQuantizationType[type_name]
        if type_name in K_QUANT_HALVES:
            raw = random_blocks(type_name, *values.shape, rng)
        elif type_name == "I8":  # a type that no model uses: for tests of refusals
            raw = values.astype(np.int8)
        else:
            raw = gguf.quantize(values, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
