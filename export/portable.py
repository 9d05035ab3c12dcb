"""The portable flavour of a package: a graph over stock operators, with weights in MatMulNBits' form.

The codes and factors are the native flavour's; 5 and 6 bits take 8 here. A minimum of a block, which MatMulNBits does
not know, is an offset beside it: what it adds is the sum of the block's inputs times the offset.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..devices.reporting import Progress
from ..errors import ModelError
from .architectures import DecoderModel
from .blocks import CARRIED, BlockFormat, BlockTensor, Bytes, Floats, carry_over, to_float
from .native import GRAPH_BYTES
from .package import DATA_FILE, MODEL_FILE
from .portable_layout import matrix_parts
from .quantize import quantize, stored_factors
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
        self._matrices = plan_matrices(self.model, source, bits)

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


def _stored_bits(planned: PlannedMatrix) -> int:
    return 4 if planned.form.bits == 4 else 8


def _stored_bytes(planned: PlannedMatrix) -> int:
    form = planned.form
    rows, columns = planned.weight.shape
    return matrix_parts(rows, columns, _stored_bits(planned), form.block, form.has_min).end


def _write_matrix(planned: PlannedMatrix, out: WeightFile) -> MatrixRecord:
    """Streams the codes into the weight file, then scales and offsets (an eighth of them each, in memory till then).

    Raises:
        ModelError: it holds NaN or infinity, or the source ends early.
    """
    offset, form, tensor = out.align(), planned.form, planned.source
    rows, columns = planned.weight.shape
    bits, meter = _stored_bits(planned), ErrorMeter()
    multiplier = multiplier_of(planned)
    scales: list[Floats] = []
    offsets: list[Floats] = []
    for raw in raw_chunks(planned):
        chunk = _stored_chunk(raw, planned, multiplier, meter)
        out.write(_unsigned(chunk).tobytes())
        scales.append(chunk.scales)
        if chunk.mins is not None:
            offsets.append(chunk.mins + chunk.scales * np.float32(_middle(form)))
    parts = matrix_parts(rows, columns, bits, form.block, form.has_min, offset)
    for place, arrays in ((parts.scales, scales), (parts.offsets, offsets)):
        if place is not None:
            out.write(bytes(place[0] - out.size))
            for array in arrays:
                out.write(array.astype(np.float32).tobytes())
    assert out.size == parts.end
    max_error, rms_error = meter.relative()
    return MatrixRecord(
        role=planned.weight.role, source=tensor.name, source_type=tensor.type_name, rows=rows, columns=columns,
        bits=bits, block=form.block, has_min=form.has_min, multiplier=1.0, offset=offset, bytes=parts.end - offset,
        max_error=max_error, rms_error=rms_error,
    )  # fmt: skip


def _stored_chunk(raw: Bytes, planned: PlannedMatrix, multiplier: float, meter: ErrorMeter) -> BlockTensor:
    """Some rows with the factors that the native flavour stores of them."""
    type_name, form = planned.source.type_name, planned.form
    if not planned.exact:
        values = to_float(raw, type_name)
        stored = quantize(values, form, multiplier)
        meter.add(values, stored.dequantize())
        return stored
    chunk = carry_over(raw, type_name)
    check_finite(chunk.largest_factor(), planned.source)
    if CARRIED[type_name].half_factors:
        return chunk
    mins = None if chunk.mins is None else stored_factors(chunk.mins, multiplier)
    stored = BlockTensor(form, chunk.codes, stored_factors(chunk.scales, multiplier), mins)
    meter.add(chunk.dequantize(), stored.dequantize())
    return stored


def _middle(form: BlockFormat) -> int:
    """The code that MatMulNBits' zero, in the middle of its codes, stands for; 0 for signed codes."""
    return 1 << (form.bits - 1) if form.has_min else 0


def _unsigned(chunk: BlockTensor) -> Bytes:
    """Codes whose zero is in the middle of 4 or 8 bits; of 4 bits two neighbours a byte, the first in the low half."""
    form, codes = chunk.format, chunk.codes
    if form.bits == 4:
        paired: Bytes = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
        return paired
    # an int8 byte becomes an unsigned one when its highest bit is turned
    raised: Bytes = codes + np.uint8(128 if form.bits == 8 else 128 - (1 << (form.bits - 1)))
    return raised
