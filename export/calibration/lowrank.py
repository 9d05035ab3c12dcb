"""Low-rank projections as a calibration leaves them in a package, and as the archive takes them.

For each KV head of each layer all 2D coefficients of a key with its value, the most telling first, so that any rank is
a cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import kernels
from ...errors import ModelError
from ..package import Package
from .files import Floats, open_calibration, write_calibration

ENCODER, DECODER = "layers.{}.pairs.encoder", "layers.{}.pairs.decoder"


@dataclass(frozen=True)
class Projections:
    """c = (x - mean) ``encoders``, x ~ mean + c ``decoders``, x a key before RoPE and its value side by side; float32
    [L, K, 2D, 2D] both, in ``encoders`` the last axis and in ``decoders`` the third are the coefficients, the most
    telling first.
    """

    encoders: Floats
    decoders: Floats


def write_lowrank(
    package: Package, method: str, found: Projections, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes them and returns their record. Raises as `write_calibration`."""
    tensors = {}
    for layer in range(len(found.encoders)):
        tensors[ENCODER.format(layer)] = found.encoders[layer]
        tensors[DECODER.format(layer)] = found.decoders[layer]
    return write_calibration(package, method, tensors, figures)


def open_lowrank(
    package: Package, method: str, layers: Sequence[int], ranks: tuple[int, int]
) -> tuple[kernels.LowRankBasis, str]:
    """The basis of these ``layers``, cut to the ``ranks`` of a block's keys' and values' sides, and the calibration's
    sha256.

    Raises:
        ModelError: as `open_calibration`.
    """
    spec = package.spec
    shape = (spec.kv_heads, 2 * spec.head_size, 2 * spec.head_size)
    names = [name.format(layer) for layer in range(spec.layers) for name in (ENCODER, DECODER)]
    found = open_calibration(package, method, dict.fromkeys(names, shape))
    encoders, decoders = (
        np.stack([found.tensors[name.format(layer)] for layer in layers]) for name in (ENCODER, DECODER)
    )
    borders = [ranks[0], sum(ranks)]
    keys, values, rest = np.split(encoders, borders, axis=3)
    of_keys, of_values, of_rest = np.split(decoders, borders, axis=2)
    try:
        basis = kernels.LowRankBasis(
            key_encoders=keys, key_decoders=of_keys, value_encoders=values, value_decoders=of_values,
            rest_encoders=rest, rest_decoders=of_rest,
        )  # fmt: skip
    except ValueError as error:
        command = f"satchel calibrate MODEL --method {method}"
        raise ModelError(
            f"the calibration for {method} in {package.folder} cannot be used ({error}); repeat it: {command}"
        ) from None
    return basis, found.sha256
