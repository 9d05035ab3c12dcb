"""Inverse frequencies of rotary positions, with every scaling already in them.

The graph carries the result, so that the kernels know nothing of scaling schemes.

Linear: Chen et al. 2023 (arXiv 2306.15595). YaRN: Peng et al. 2023 (arXiv 2309.00071). Llama 3: the scheme of
its reference implementation, wavelengths above ``original_context / low`` divided by ``factor``, those below
``original_context / high`` untouched, a linear blend between.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .spec import RopeSpec


def rope_frequencies(rope: RopeSpec) -> npt.NDArray[np.float32]:
    """Radians per position for each pair of dimensions, float32 [dims/2]."""
    half = rope.dims // 2
    plain = rope.base ** (-np.arange(half, dtype=np.float64) / half)
    if rope.scaling == "linear":
        frequencies = plain / rope.factor
    elif rope.scaling == "yarn":
        keep = _yarn_share(rope)
        frequencies = plain * keep + plain / rope.factor * (1 - keep)
    elif rope.scaling == "llama3":
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        turns = rope.original_context * plain / (2 * math.pi)
        keep = np.clip((turns - low) / max(high - low, 1e-6), 0, 1)
        frequencies = plain * keep + plain / rope.factor * (1 - keep)
    else:
        frequencies = plain
    if rope.frequency_factors:
        frequencies = frequencies / np.asarray(rope.frequency_factors, dtype=np.float64)
    return frequencies.astype(np.float32)


def yarn_attention_factor(factor: float) -> float:
    """YaRN's magnitude correction for a context that is ``factor`` times the original."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def stretched(rope: RopeSpec, trained: int, factor: float) -> RopeSpec:
    """YaRN for a model of ``trained`` tokens that is to read ``factor`` times as many.

    Raises:
        ModelError: the model's positions are scaled already.
    """
    if rope.scaling != "none" or rope.frequency_factors:
        kind = rope.scaling if rope.scaling != "none" else "frequency factors"
        raise ModelError(f"the model scales its positions already ({kind}); leave out --rope")
    attention = yarn_attention_factor(factor)
    return replace(rope, scaling="yarn", factor=factor, original_context=trained, attention_factor=attention)


def _yarn_share(rope: RopeSpec) -> npt.NDArray[np.float64]:
    """Share of the unscaled frequency per pair: 1 where it turns often within the original context, 0 where
    rarely.
    """

    def pair_of(turns: float) -> float:
        return rope.dims * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(math.floor(pair_of(rope.beta_fast)), 0)
    high = min(math.ceil(pair_of(rope.beta_slow)), rope.dims - 1)
    ramp = (np.arange(rope.dims // 2, dtype=np.float64) - low) / max(high - low, 1e-3)
    return 1 - np.clip(ramp, 0, 1)
