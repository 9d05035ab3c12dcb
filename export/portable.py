"""The portable flavour of a package: a graph over stock operators, with weights in MatMulNBits' form.

Codes without a minimum are carried over as the native flavour has them (5 and 6 bits take 8 here, with the same
scales). Where the native flavour keeps a minimum for each block, weights are rounded anew: to 8 bits, or, in the layers
of a package of 4 bits, to 4 bits with a zero point.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ..devices.reporting import Progress
from ..errors import ModelError
from .architectures import DecoderModel
from .blocks import CARRIED, BlockTensor, Bytes, Floats, carry_over, to_float
from .native import GRAPH_BYTES
from .package import DATA_FILE, MODEL_FILE
from .portable_layout import matrix_parts
from .quantize import EIGHT, FOUR, quantize, quantize_with_zeros, stored_factors
from .sources import Source
from .weights import (
    PAGE_BYTES,
    ErrorMeter,
    MatrixRecord,
    PlannedMatrix,
    WeightFile,
    check_finite,
    multiplier_of,
    plan_matrices,
    raw_chunks,
    read_vector,
    share_embedding,
)


class PortableFlavour:
    """Writes ``model.onnx`` and ``model.onnx.data``.

    Raises:
        ModelError: the model has a mixture of experts.
    """

    name = "portable"

    def __init__(self, model: DecoderModel, source: Source, bits: int) -> None:
        if model.spec.experts is not None:
            raise ModelError(
                f"{source.path}: the portable flavour has no mixture of experts ({model.spec.experts.count} here); "
                "use --flavour native, on the CPU"
            )
        self.model = share_embedding(model, source)
        self._source = source
        self._matrices = [_portable(planned, bits) for planned in plan_matrices(self.model, source, bits)]

    @property
    def bytes_needed(self) -> int:
        """Upper bound of the bytes of the files."""
        return GRAPH_BYTES + sum(_stored_bytes(matrix) + PAGE_BYTES for matrix in self._matrices)

    def write(self, folder: Path, progress: Progress) -> list[MatrixRecord]:
        """Writes the files into ``folder``; ``progress`` counts bytes of the weight file."""
        total = sum(_stored_bytes(matrix) for matrix in self._matrices)
        records: list[MatrixRecord] = []
        with (folder / DATA_FILE).open("wb") as file:
            out = WeightFile(file, lambda done: progress("exporting", min(done, total), total))
            for matrix in self._matrices:
                records.append(_write_matrix(matrix, out))
        vectors = {
            weight.role: read_vector(weight, self._source) for weight in self.model.weights if len(weight.shape) == 1
        }
        from .graph import build_graph  # brings onnx with it
        from .operators import PortableOperators

        by_role = {record.role: record for record in records}
        model = build_graph(self.model.spec, by_role, vectors, DATA_FILE, PortableOperators)
        (folder / MODEL_FILE).write_bytes(model.SerializeToString())
        return records


def _portable(planned: PlannedMatrix, bits: int) -> PlannedMatrix:
    """The same matrix without minima."""
    if not planned.form.has_min:
        return planned
    in_layer = planned.weight.role.startswith("layers.")
    return dataclasses.replace(planned, form=FOUR if bits == 4 and in_layer else EIGHT, exact=False)


def _stored_bits(planned: PlannedMatrix) -> int:
    return 4 if planned.form.bits == 4 else 8


def _stored_bytes(planned: PlannedMatrix) -> int:
    form = planned.form
    rows, columns = planned.weight.shape
    return matrix_parts(rows, columns, _stored_bits(planned), form.block, form.has_min).end


def _write_matrix(planned: PlannedMatrix, out: WeightFile) -> MatrixRecord:
    """Streams the codes into the weight file, then scales and zero points (an eighth of them, in memory till then).

    Raises:
        ModelError: it holds NaN or infinity, or the source ends early.
    """
    offset, form, tensor = out.align(), planned.form, planned.source
    rows, columns = planned.weight.shape
    bits, meter = _stored_bits(planned), ErrorMeter()
    multiplier = 1.0 if form.has_min else multiplier_of(planned)
    scales: list[Floats] = []
    zeros: list[Bytes] = []
    for raw in raw_chunks(planned):
        codes, factors, points = _converted(raw, planned, multiplier, meter)
        out.write((_paired(codes) if bits == 4 else codes).tobytes())
        scales.append(factors)
        if points is not None:
            zeros.append(_paired(points))
    parts = matrix_parts(rows, columns, bits, form.block, form.has_min, offset)
    for place, arrays in ((parts.scales, scales), (parts.zeros, zeros)):
        if place is not None:
            out.write(bytes(place[0] - out.size))
            for array in arrays:
                out.write(array.tobytes())
    assert out.size == parts.end
    max_error, rms_error = meter.relative()
    return MatrixRecord(
        role=planned.weight.role, source=tensor.name, source_type=tensor.type_name, rows=rows, columns=columns,
        bits=bits, block=form.block, has_min=form.has_min, multiplier=1.0, offset=offset, bytes=parts.end - offset,
        max_error=max_error, rms_error=rms_error,
    )  # fmt: skip


def _converted(
    raw: Bytes, planned: PlannedMatrix, multiplier: float, meter: ErrorMeter
) -> tuple[Bytes, Floats, Bytes | None]:
    """Codes uint8 [rows, columns], scales [rows, blocks], and zero points where they are not in the middle."""
    type_name, form = planned.source.type_name, planned.form
    if form.has_min:
        values = to_float(raw, type_name)
        check_finite(float(np.abs(values).max()), planned.source)
        codes, scales, zeros = quantize_with_zeros(values, form)
        steps = (codes.astype(np.float32) - np.repeat(zeros, form.block, axis=1)).astype(np.float32)
        meter.add(values, steps * np.repeat(scales, form.block, axis=1))
        return codes, scales, zeros
    if planned.exact:
        chunk = carry_over(raw, type_name)
        check_finite(chunk.largest_factor(), planned.source)
        stored = chunk.scales if CARRIED[type_name].half_factors else stored_factors(chunk.scales, multiplier)
        rounded = BlockTensor(form, chunk.codes, stored)
        if not CARRIED[type_name].half_factors:
            meter.add(chunk.dequantize(), rounded.dequantize())
    else:
        values = to_float(raw, type_name)
        rounded = quantize(values, form, multiplier)
        meter.add(values, rounded.dequantize())
    if form.bits == 4:
        return rounded.codes, rounded.scales, None
    middle = 128 if form.bits == 8 else 128 - form.zero  # int8 bytes turn into uint8 by their highest bit
    return (rounded.codes + np.uint8(middle)).astype(np.uint8), rounded.scales, None


def _paired(codes: Bytes) -> Bytes:
    """Two neighbours of 4 bits a byte, the first in the low half; an odd last one with zeros: uint8 [rows, n / 2]."""
    if codes.shape[1] % 2:
        codes = np.concatenate([codes, np.zeros((len(codes), 1), np.uint8)], axis=1)
    paired: Bytes = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
    return paired
