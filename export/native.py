"""The native flavour of a package: packed matrices in a mapped file and a graph over our own operators.

A flavour is one such file: it says how many bytes it will write and writes them. The exporter does the rest.
"""

from __future__ import annotations

from pathlib import Path

from ..devices.reporting import Progress
from .architectures import DecoderModel
from .package import DATA_FILE, MODEL_FILE
from .sources import Source
from .weights import (
    PAGE_BYTES,
    MatrixRecord,
    WeightFile,
    plan_matrices,
    read_vector,
    share_embedding,
    write_matrix,
)

GRAPH_BYTES = 4 << 20  # what the graph without its matrices takes at most, for the check of free space


class NativeFlavour:
    """Writes ``model.onnx`` and ``model.onnx.data``."""

    name = "native"

    def __init__(self, model: DecoderModel, source: Source, bits: int) -> None:
        self.model = share_embedding(model, source)
        self._source = source
        self._matrices = plan_matrices(self.model, source, bits)

    @property
    def bytes_needed(self) -> int:
        """Upper bound of the bytes of the files."""
        return GRAPH_BYTES + sum(matrix.packed_bytes + PAGE_BYTES for matrix in self._matrices)

    def write(self, folder: Path, progress: Progress) -> list[MatrixRecord]:
        """Writes the files into ``folder``; ``progress`` counts bytes of the weight file."""
        total = sum(matrix.packed_bytes for matrix in self._matrices)
        records: list[MatrixRecord] = []
        with (folder / DATA_FILE).open("wb") as file:
            out = WeightFile(file, lambda done: progress("exporting", min(done, total), total))
            for matrix in self._matrices:
                records.append(write_matrix(matrix, out))
        vectors = {
            weight.role: read_vector(weight, self._source)
            for weight in self.model.weights
            if len(weight.shape) == 1
        }
        from .graph import build_graph  # brings onnx with it: 15 MB that only an export needs

        model = build_graph(self.model.spec, {record.role: record for record in records}, vectors, DATA_FILE)
        (folder / MODEL_FILE).write_bytes(model.SerializeToString())
        return records
