"""Rotary positions of a config.json in GGUF's keys and tensors.

Facts: the reference implementations of Llama 3, YaRN (arXiv 2309.00071) and LongRoPE (arXiv 2402.13753), and
what llama.cpp's converter writes for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..rope import yarn_attention_factor
from .hf_record import Record

Values = dict[str, Any]
Factors = Mapping[str, Sequence[float]]
SCALINGS = ("default", "linear", "llama3", "longrope", "yarn")
MAX_HEAD_SIZE = 1 << 16


def rope_keys(config: Record, head_size: int) -> tuple[Values, Factors]:
    """(keys without the architecture's name, values of frequency factor tensors).

    Raises:
        ModelError: the scaling is not one of ``SCALINGS``, or its parameters are missing or of the wrong kind.
    """
    main, local = _parameters(config)
    share = main.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if share > 1 or head_size > MAX_HEAD_SIZE:
        raise config.error(f"has partial_rotary_factor {share} over {head_size} dimensions, which cannot be")
    dims = int(head_size * share)
    keys: Values = {
        "rope.freq_base": main.number("rope_theta", config.number("rope_theta", 10000.0)),
        "rope.dimension_count": dims,
    }
    if local is not None:
        if (local.get("rope_type") or "default") != "default":
            raise config.error("has scaled rotary positions in its windowed layers, which are not supported")
        keys["rope.freq_base_swa"] = local.number("rope_theta", 10000.0)
    kind = main.get("rope_type") or main.get("type") or "default"
    if kind == "su":  # its first name
        kind = "longrope"
    if kind not in SCALINGS:
        raise config.error(f"has the rope_type {kind!r:.40}; supported: {', '.join(SCALINGS)}")
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": main.number("factor")}
    elif kind == "yarn":
        keys |= _yarn(config, main)
    elif kind == "llama3":
        return keys, {"rope_freqs.weight": _llama3(config, main, keys["rope.freq_base"], dims)}
    elif kind == "longrope":
        return _longrope(config, main, keys, dims)
    return keys, {}


def _parameters(config: Record) -> tuple[Record, Record | None]:
    """The record of the layers that see everything, and that of windowed layers where there are two."""
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is None or config.get(key) == {}:
            continue
        record = config.inner(key)
        if record.get("full_attention") is not None:
            nested = record.get("sliding_attention") is not None
            return record.inner("full_attention"), record.inner("sliding_attention") if nested else None
        return record, _local(config)
    return config, _local(config)


def _local(config: Record) -> Record | None:
    if config.get("rope_local_base_freq") is None:
        return None
    return config.part({"rope_theta": config.number("rope_local_base_freq")})


def _original_context(config: Record, scaling: Record) -> int:
    """The context that the model was trained with before its frequencies were scaled; the config's own key
    goes before that of the scaling, as in ``transformers``.
    """
    context = scaling.integer("original_max_position_embeddings", config.integer("max_position_embeddings"))
    return config.integer("original_max_position_embeddings", context)


def _yarn(config: Record, scaling: Record) -> Values:
    original = _original_context(config, scaling)
    factor = scaling.number("factor", config.integer("max_position_embeddings") / original)
    if not scaling.flag("truncate", True):
        raise config.error("has YaRN with truncate false, which is not supported")
    usual = yarn_attention_factor(factor)
    wanted = usual
    if scaling.get("attention_factor") is not None:
        wanted = scaling.number("attention_factor")
    elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
        one, other = ((usual - 1) * scaling.number(key) + 1 for key in ("mscale", "mscale_all_dim"))
        wanted = one / other
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": wanted / usual,  # GGUF: on top of YaRN's own
        "rope.scaling.yarn_beta_fast": scaling.number("beta_fast", 32.0),
        "rope.scaling.yarn_beta_slow": scaling.number("beta_slow", 1.0),
    }


def _llama3(config: Record, scaling: Record, base: float, dims: int) -> list[float]:
    """What each frequency is divided by: 1 where it turns often in the original context, ``factor`` where
    rarely, blended between.
    """
    factor, original = scaling.number("factor"), _original_context(config, scaling)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        raise config.error(f"has high_freq_factor {high}, which must be above low_freq_factor {low}")
    found = []
    for pair in range(dims // 2):
        turns = original * base ** (-2 * pair / dims) / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / (keep + (1 - keep) / factor))
    return found


def _longrope(config: Record, scaling: Record, keys: Values, dims: int) -> tuple[Values, Factors]:
    original, context = _original_context(config, scaling), config.integer("max_position_embeddings")
    factor = scaling.number("factor", context / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(max(original, 2))) if factor > 1 else 1.0
    keys |= {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": scaling.number("attention_factor", usual),
    }
    return keys, {
        "rope_factors_long.weight": scaling.numbers("long_factor", dims // 2),
        "rope_factors_short.weight": scaling.numbers("short_factor", dims // 2),
    }
