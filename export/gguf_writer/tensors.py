"""In which type each tensor goes into a GGUF file, and its bytes, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from ..architectures import DecoderModel
from ..architectures.layout import IGNORED_SUFFIXES, LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from ..blocks import to_float
from ..sources import Source, SourceTensor
from ..sources.gguf import INTERLEAVED_ROPE

CHUNK_ELEMENTS = 1 << 20  # converted at a time: 4 MB as float32
HALF_MAX = 65504.0
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# families in which llama.cpp does not take the embedding for a missing output matrix
OUTPUT_REQUIRED = ("olmo2",)
FACTORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
ROUTER = ".ffn_gate_inp.weight"
FLOAT = gguf.GGMLQuantizationType.F32
EIGHT, FOUR = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
# quantized types that llama.cpp reads from files -> bits of a code
CODE_BITS = {
    "Q8_0": 8, "Q6_K": 6, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "IQ4_NL": 4, "IQ4_XS": 4,
    "MXFP4": 4, "Q3_K": 3, "IQ3_S": 3, "IQ3_XXS": 3, "Q2_K": 2, "IQ2_S": 2, "IQ2_XS": 2, "IQ2_XXS": 2, "TQ2_0": 2,
    "TQ1_0": 2, "IQ1_S": 1, "IQ1_M": 1,
}  # fmt: skip
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file: ``kind`` is its GGML type there; ``carried`` when its bytes are those of the source.

    ``head_size`` is not 0 when rows of queries or keys are to be interleaved, as llama.cpp has them in some
    families.
    """

    name: str
    source: SourceTensor
    kind: gguf.GGMLQuantizationType
    carried: bool
    head_size: int = 0

    @property
    def size(self) -> int:
        """Bytes in the file."""
        if self.carried:
            return self.source.size
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return int(math.prod(self.source.shape) // block * block_bytes)

    def chunks(self) -> Iterator[Bytes]:
        """The bytes in order.

        Raises:
            ModelError: the source ends early, or holds what the type cannot.
        """
        tensor = self.source
        step = self.head_size if len(tensor.shape) > 1 and self.head_size else 1  # a vector is one row
        rows = max(CHUNK_ELEMENTS // tensor.columns // step, 1) * step
        for start, stop in tensor.row_chunks(rows):
            raw = tensor.read_rows(start, stop)
            yield raw.reshape(-1) if self.carried else self._convert(raw)

    def _convert(self, raw: Bytes) -> Bytes:
        values = to_float(raw, self.source.type_name)
        largest = float(np.abs(values).max())
        if not math.isfinite(largest) or (self.kind != FLOAT and largest > HALF_MAX):
            raise ModelError(
                f"{self.source.path}: tensor {self.source.name} holds NaN, infinity or numbers beyond {HALF_MAX:.0f}; "
                "download the file again"
            )
        if self.head_size:
            values = _interleave(values, self.head_size, vector=len(self.source.shape) == 1)
        if self.kind == FLOAT:
            return values.astype("<f4", copy=False).reshape(-1).view(np.uint8)
        found: Bytes = gguf.quantize(values, self.kind)
        return found.reshape(-1).view(np.uint8)


def _interleave(values: npt.NDArray[np.float32], head_size: int, *, vector: bool) -> npt.NDArray[np.float32]:
    """Whole heads from half-split order (first halves, then second halves) to pairs side by side."""
    rows = values.reshape(-1) if vector else values
    heads = rows.reshape(-1, 2, head_size // 2, *rows.shape[1:])
    found: npt.NDArray[np.float32] = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)
    return found


def plan_tensors(source: Source, model: DecoderModel, bits: int) -> list[PlannedTensor]:
    """Every tensor of the file, in the source's order.

    ``bits`` 4 rounds the layers' matrices; embedding and output stay at 8, and routers, norms and biases in floats:
    they are small, or decide what the others are multiplied with.
    """
    queries_and_keys = {
        weight.tensor for weight in model.weights
        if weight.role.removesuffix(".bias").rsplit(".", 1)[-1] in ("query", "key")
    }  # fmt: skip
    interleave = not source.interleaved_rope and source.architecture in INTERLEAVED_ROPE
    planned = []
    for name, tensor in source.tensors.items():
        if name.endswith(IGNORED_SUFFIXES):
            continue
        head_size = model.spec.head_size if interleave and name in queries_and_keys else 0
        planned.append(_plan(name, tensor, bits, head_size))
    if source.architecture in OUTPUT_REQUIRED and OUTPUT not in source.tensors:
        planned.append(_plan(OUTPUT, source.tensors[EMBEDDING], bits))
    return planned


def _plan(name: str, tensor: SourceTensor, bits: int, head_size: int = 0) -> PlannedTensor:
    limit = 8 if name in (EMBEDDING, OUTPUT) else bits
    if len(tensor.shape) == 1 or name.endswith(ROUTER) or name in FACTORS:
        return PlannedTensor(name, tensor, FLOAT, carried=False, head_size=head_size)
    if CODE_BITS.get(tensor.type_name, 32) <= limit and not head_size:
        return PlannedTensor(name, tensor, gguf.GGMLQuantizationType[tensor.type_name], carried=True)
    return PlannedTensor(name, tensor, EIGHT if limit == 8 else FOUR, carried=False, head_size=head_size)
