"""What the families share: from metadata to a spec, and from a spec to the weights of the decoder.

Keys and tensor names are GGUF's; sources of other kinds present themselves in them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ...errors import ModelError
from ..rope import yarn_attention_factor
from ..sources import Source
from ..spec import ExpertSpec, ModelSpec, RopeSpec
from .keys import Keys
from .layout import (
    ALL_LINEARS,
    LONG_FACTORS,
    QUERY_KEY_VALUE,
    ROPE_FACTORS,
    SHORT_FACTORS,
    DecoderModel,
    Layout,
    WeightRole,
    check_shapes,
)

__all__ = [
    "ALL_LINEARS",
    "QUERY_KEY_VALUE",
    "DecoderModel",
    "Keys",
    "WeightRole",
    "decoder",
    "read_experts",
    "read_spec",
    "read_windowed_spec",
]


def decoder(
    source: Source, spec: ModelSpec, *, biases: tuple[str, ...] = (), fused: bool = False
) -> DecoderModel:
    """The model of ``spec`` with the weights of ``source``, each of them checked.

    Args:
        biases: which of the layer's linears (as GGUF names them) may have a bias.
        fused: query, key and value are one tensor, and so are gate and up.
    """
    interleaved = source.interleaved_rope
    if interleaved and spec.rope.dims != spec.head_size:
        raise ModelError(
            f"{source.path}: rotary positions on {spec.rope.dims} of {spec.head_size} dimensions are not "
            f"supported for {spec.architecture}; use another model"
        )
    if spec.experts is None and Keys(source).integer("expert_count", 0):
        raise ModelError(
            f"{source.path} is a mixture of experts ({spec.architecture}.expert_count), which "
            "is supported for qwen3moe only; use a dense model"
        )
    if not any(spec.attention_windows) and any(Keys(source).windows(spec.layers)):
        raise ModelError(
            f"{source.path} has a sliding window ({spec.architecture}.attention.sliding_window), which is not "
            f"supported for {spec.architecture}; use another model"
        )
    layout = Layout(source, spec, biases, fused)
    weights = tuple(layout.roles())
    check_shapes(source, weights)
    return DecoderModel(spec, weights)


def read_spec(source: Source) -> ModelSpec:
    """What the metadata say in the keys that all families share; a family replaces what it has otherwise."""
    keys = Keys(source)
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{source.path} has no tensor token_embd.weight; it is not a complete model")
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    if heads < 1 or hidden < 1:
        raise ModelError(f"{source.path}: {heads} heads over {hidden} dimensions cannot be; use another file")
    head_size = keys.integer("attention.key_length", hidden // heads)
    if keys.integer("attention.value_length", head_size) != head_size:
        raise ModelError(
            f"{source.path}: keys and values of different sizes are not supported; use another model"
        )
    name = source.metadata.get("general.name")
    return ModelSpec(
        architecture=source.architecture,
        name=name if isinstance(name, str) and name else source.path.stem,
        layers=keys.integer("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=keys.integer("attention.head_count_kv", heads),
        head_size=head_size,
        feed_forward=keys.integer("feed_forward_length"),
        vocab=embedding.rows,
        context_length=keys.integer("context_length"),
        norm_epsilon=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_read_rope(source, keys, head_size),
        tied_embeddings="output.weight" not in source.tensors,
        attention_scale=keys.number("attention.scale", 0.0) or 1.0 / math.sqrt(max(head_size, 1)),
        attention_softcap=keys.number("attn_logit_softcapping", 0.0),
        logits_softcap=keys.number("final_logit_softcapping", 0.0),
    )


def read_windowed_spec(source: Source, period: int = 0) -> ModelSpec:
    """`read_spec`, with the sliding windows that the metadata name; ``period`` as in `Keys.windows`."""
    spec = read_spec(source)
    return replace(spec, attention_windows=Keys(source).windows(spec.layers, period))


def read_experts(source: Source) -> ExpertSpec:
    """The experts that the metadata describe; GGUF's older files mean normalized weights when they do not say."""
    keys = Keys(source)
    return ExpertSpec(
        count=keys.integer("expert_count"),
        used=keys.integer("expert_used_count"),
        width=keys.integer("expert_feed_forward_length"),
        normalized=bool(keys.integer("expert_weights_norm", 1)),
    )


def _read_rope(source: Source, keys: Keys, head_size: int) -> RopeSpec:
    scaling = keys.get("rope.scaling.type") or "none"
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    if scaling == "none" and keys.get("rope.scale_linear") is not None and factor != 1.0:
        scaling = "linear"
    if scaling not in ("none", "linear", "yarn", "longrope"):
        raise ModelError(
            f"{source.path}: RoPE scaling {scaling!r} is not supported (none, linear, yarn, longrope)"
        )
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if scaling == "yarn":
        attention_factor *= yarn_attention_factor(factor)
    context = keys.integer("context_length")
    original = keys.integer("rope.scaling.original_context_length", context)
    # LongRoPE has factors for texts within the original context, too: a reader of long documents has one cache
    # for all lengths and takes the long ones
    factors = _read_factors(source, (LONG_FACTORS if context > original else SHORT_FACTORS, ROPE_FACTORS), head_size)
    if scaling == "longrope" and not factors:
        raise ModelError(f"{source.path} has no tensor {LONG_FACTORS}, which its RoPE scaling needs; use another file")
    return RopeSpec(
        base=keys.number("rope.freq_base", 10000.0),
        dims=keys.integer("rope.dimension_count", head_size),
        scaling="none" if scaling == "longrope" else scaling,
        factor=factor,
        original_context=original,
        attention_factor=attention_factor,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        frequency_factors=factors,
    )


def _read_factors(source: Source, names: tuple[str, ...], head_size: int) -> tuple[float, ...]:
    """The frequency factors in the first tensor of these names that there is."""
    for name in names:
        if name in source.tensors:
            tensor = source.tensors[name]
            if tensor.type_name != "F32" or tensor.columns > head_size:
                raise ModelError(f"{source.path}: {name} is {tensor.type_name} {list(tensor.shape)}, not float32")
            return tuple(tensor.read_rows(0, tensor.rows).view(np.float32).reshape(-1).tolist())
    return ()
