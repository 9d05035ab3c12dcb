"""Hugging Face's config.json in GGUF's keys: one row per family, old and new spellings of the same facts.

``transformers`` 5 writes rotary positions under ``rope_parameters`` (perhaps one record per kind of layer) and
windows under ``layer_types``; before, there were ``rope_theta``, ``rope_scaling``, ``rope_local_base_freq``,
``sliding_window_pattern``, ``max_window_layers`` and ``use_sliding_window``. Beyond what GGUF files usually
carry, these keys say what llama.cpp has in its code:

* ``X.attention.sliding_window_pattern``: one bool per layer, true where the layer has the window; always beside
  ``X.attention.sliding_window``, so that no family's usual pattern is taken for it;
* ``X.attention.scale``: what query times key is multiplied by, where it is not 1/sqrt(head size);
* ``X.rope.freq_base_swa``: the base of windowed layers, where they have one of their own;
* ``X.rope.layers`` (smollm3): one bool per layer, true where positions are rotated.

RoPE scaling: ``linear`` and ``yarn`` are metadata; ``llama3`` becomes the tensor ``rope_freqs.weight`` and
``longrope`` the tensors ``rope_factors_long.weight`` and ``rope_factors_short.weight``, as in GGUF files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .hf_names import (
    ATTENTION,
    FEED_FORWARD,
    FUSED,
    HEAD_NORMS,
    PLAIN,
    POST_NORMS,
    PRE_NORMS,
    SANDWICH_NORMS,
    TensorNames,
)
from .hf_record import Record
from .hf_rope import rope_keys

Values = dict[str, Any]
MAX_LAYERS = 1024


@dataclass(frozen=True)
class Family:
    """How the configs of one ``model_type`` are read.

    ``keys``: what the family has beyond the common keys. ``defaults``: values of the class in ``transformers``
    that real configs leave out. ``supported``: value that a setting must have, if it is there.
    """

    architecture: str
    names: TensorNames = field(default_factory=TensorNames)
    activation: str = "silu"
    keys: Callable[[Record], Values] = lambda _: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    supported: Mapping[str, Any] = field(default_factory=dict)


def _gemma(config: Record) -> Values:
    """A softcap of 0 is none: a null in the config is not what GGUF's readers take for a missing key."""
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        "attention.scale": config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        **{key: 0.0 if config.get(key) is None else config.number(key) for key in caps},
    }


def _granite(config: Record) -> Values:
    return config.present({
        "embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale", "attention_multiplier": "attention.scale",
    })  # fmt: skip


def _smollm3(config: Record) -> Values:
    layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    interval = config.integer("no_rope_layer_interval", 4)
    rotated = [bool((index + 1) % interval) for index in range(layers)]
    if config.get("no_rope_layers") is not None:  # in spite of the name, 1 is a layer with rotary positions
        rotated = [bool(flag) for flag in config.integers("no_rope_layers", layers)]
    return {"rope.layers": rotated}


def _qwen3_moe(config: Record) -> Values:
    experts = "num_local_experts" if config.get("num_experts") is None else "num_experts"
    return {
        "expert_count": config.integer(experts),
        "expert_used_count": config.integer("num_experts_per_tok"),
        "expert_feed_forward_length": config.integer("moe_intermediate_size"),
        "expert_weights_norm": config.flag("norm_topk_prob", False),
    }


GEMMA_NAMES = {**SANDWICH_NORMS, **ATTENTION, **FEED_FORWARD}
GEMMA3 = Family(
    "gemma3", TensorNames({**GEMMA_NAMES, **HEAD_NORMS}, norm_shift=1.0), "gelu_pytorch_tanh", _gemma,
    defaults={
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "sliding_window_pattern": 6,
    },
    supported={"use_bidirectional_attention": False},
)  # fmt: skip
QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN3_NAMES = {**PLAIN, **HEAD_NORMS}
FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "mistral": Family("llama", defaults={"sliding_window": 4096}),
    "qwen2": Family("qwen2", defaults=QWEN_WINDOWS),
    "qwen3": Family("qwen3", TensorNames(QWEN3_NAMES), defaults={**QWEN_WINDOWS, "head_dim": 128}),
    "qwen3_moe": Family(
        "qwen3moe",
        TensorNames({**PRE_NORMS, **ATTENTION, **HEAD_NORMS, "mlp.gate": "ffn_gate_inp"}),
        keys=_qwen3_moe,
        supported={"mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": False},
        defaults={"use_sliding_window": False},
    ),
    "gemma2": Family(
        "gemma2", TensorNames(GEMMA_NAMES, norm_shift=1.0), "gelu_pytorch_tanh", _gemma,
        defaults={"head_dim": 256, "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh",
                  "tie_word_embeddings": True, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0,
                  "final_logit_softcapping": 30.0},
        supported={"use_bidirectional_attention": False},
    ),
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3,  # with a part that sees pictures, which is left out
    "phi3": Family("phi3", TensorNames({**PRE_NORMS, **FUSED})),
    "smollm3": Family("smollm3", keys=_smollm3, defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
                      supported={"use_sliding_window": False}),
    "granite": Family("granite", keys=_granite),
    "olmo2": Family("olmo2", TensorNames({**POST_NORMS, **ATTENTION, **HEAD_NORMS, **FEED_FORWARD})),
}  # fmt: skip


@dataclass(frozen=True)
class Translation:
    """A config in GGUF's terms: metadata, factors of frequencies by tensor name, and the family's names."""

    metadata: Values
    factors: Mapping[str, Sequence[float]]
    names: TensorNames


def translate_config(config: Record, name: str) -> Translation:
    """GGUF metadata of a config.json.

    Args:
        name: of the model, where the config has none.

    Raises:
        ModelError: a family or a setting is not supported, or a key is missing or of the wrong kind.
    """
    family = _family(config)
    inner = config.inner("text_config") if config.get("text_config") is not None else config
    shared = {key: config.get(key) for key in ("quantization_config", "tie_word_embeddings")}
    inner = inner.with_defaults({key: value for key, value in shared.items() if value is not None})
    inner = inner.with_defaults(family.defaults)
    _refuse_what_is_not_supported(inner, family)
    head_size = _head_size(inner)
    rope, factors = rope_keys(inner, head_size)
    keys = {
        "context_length": inner.integer("max_position_embeddings"),
        "embedding_length": inner.integer("hidden_size"),
        "block_count": inner.integer("num_hidden_layers", most=MAX_LAYERS),
        "feed_forward_length": inner.integer("intermediate_size"),
        "attention.head_count": inner.integer("num_attention_heads"),
        "attention.head_count_kv": inner.integer("num_key_value_heads", inner.integer("num_attention_heads")),
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.layer_norm_rms_epsilon": inner.number("rms_norm_eps", 1e-6),
        **_window_keys(inner),
        **rope,
        **family.keys(inner),
    }
    metadata: Values = {"general.architecture": family.architecture, "general.name": name}
    metadata |= {f"{family.architecture}.{key}": value for key, value in keys.items()}
    tied = None if inner.get("tie_word_embeddings") is None else inner.flag("tie_word_embeddings", False)
    names = TensorNames(family.names.layer, family.names.norm_shift, tied)
    return Translation(metadata, factors, names)


def _family(config: Record) -> Family:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        shown = "names no model_type" if kind is None else f"has the model_type {kind!r:.60}"
        classes = config.get("architectures")
        detail = f" ({classes[0]!r:.60})" if isinstance(classes, list) and classes else ""
        raise config.error(f"{shown}{detail}; supported are: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def _refuse_what_is_not_supported(config: Record, family: Family) -> None:
    quantized = config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        raise config.error(
            f"has weights quantized by {method!r:.40} (quantization_config), which are not supported; "
            "use the model in bfloat16, float16 or float32, or its .gguf"
        )
    # Gemma's configs have both keys, and the shorter one does not count
    key = "hidden_activation" if family.activation.startswith("gelu") else "hidden_act"
    value = config.get(key)
    if value is not None and value != family.activation:
        raise config.error(f"has {key} {value!r:.40}; supported for {family.architecture}: {family.activation}")
    for key, wanted in family.supported.items():
        value = config.get(key)
        if value is not None and value != wanted:
            raise config.error(f"has {key} {value!r:.60}; supported for {family.architecture}: {wanted!r}")


def _head_size(config: Record) -> int:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return config.integer("head_dim", hidden // heads or 1)


def _window_keys(config: Record) -> Values:
    """The window and the layers that have it."""
    layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    window = config.integer("sliding_window", 0, least=0)
    if config.get("use_sliding_window") is not None and not config.flag("use_sliding_window", True):
        window = 0
    kinds = config.get("layer_types")
    if not window:
        if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
            raise config.error(f"has layer_types with {_other_kind(kinds)!r:.40} but no sliding_window")
        return {}
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise config.error(f"has layer_types {kinds!r:.60}, not a list with one entry for each of {layers} layers")
        unknown = next((kind for kind in kinds if kind not in ("full_attention", "sliding_attention")), None)
        if unknown is not None:
            raise config.error(f"has the layer type {unknown!r:.40}; supported: full_attention, sliding_attention")
        windowed = [kind == "sliding_attention" for kind in kinds]
    elif config.get("sliding_window_pattern") is not None:
        period = config.integer("sliding_window_pattern")
        windowed = [bool((index + 1) % period) for index in range(layers)]
    elif config.get("use_sliding_window") is not None and config.get("max_window_layers") is not None:
        first = config.integer("max_window_layers", least=0)
        windowed = [index >= first for index in range(layers)]
    else:
        windowed = [True] * layers
    if not any(windowed):
        return {}
    return {"attention.sliding_window": window, "attention.sliding_window_pattern": windowed}


def _other_kind(kinds: list[Any]) -> Any:
    return next(kind for kind in kinds if kind != "full_attention")
