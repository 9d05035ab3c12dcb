"""The portable operator set: stock operators only (ONNX and com.microsoft), for any execution provider.

State that goes in as ``past.L.*`` and comes out as ``present.L.*`` (see `portable_layout`): keys after RoPE, values,
and the last queries before RoPE, which scorers look at. Slots need not be neighbours in the text: positions only matter
for RoPE, so a caller may remove slots between runs; of windowed layers it must leave the newest ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from ...errors import ModelError
from ..portable_layout import OBSERVED, OBSERVED_QUERIES, matrix_parts, state_name, windows_of
from ..rope import rope_frequencies
from ..spec import ModelSpec, RopeSpec
from ..weights import MatrixRecord
from .base import MICROSOFT, GraphParts, Operators

# Angles are the sum of two products, of a multiple of this and of the rest: float32 keeps about 1e-4 radians then, for
# positions up to a million; one product would lose that at a thousand.
POSITION_STEP = 1024
LAST = np.iinfo(np.int64).max


class PortableOperators(Operators):
    """See `Operators`."""

    domains = ((MICROSOFT, 1),)

    def __init__(self, spec: ModelSpec, parts: GraphParts, matrices: Mapping[str, MatrixRecord]) -> None:
        super().__init__(spec, parts, matrices)
        self._made: set[str] = set()  # what layers share

    def embedding(self, ids: str, output: str) -> str:
        record, node = self.matrices["embedding"], self.parts.node
        codes, scales, *offsets = self._matrix("embedding", three_dimensions=True)
        rows = node(
            "GatherBlockQuantized", [codes, ids, scales], [output + ".blocks"], MICROSOFT,
            bits=record.bits, block_size=record.block, gather_axis=0, quantize_axis=2,
        )  # fmt: skip
        if offsets:
            rows = node("Add", [rows, node("Gather", [offsets[0], ids], [output + ".offsets"])], [output + ".moved"])
        shape = self.parts.constant("shape.hidden", np.array([-1, self.spec.hidden], np.int64))
        return self._scaled(self.spec.embedding_multiplier, "Reshape", [rows, shape], output)

    def linear(self, x: str, role: str, output: str, scale: float = 1.0) -> str:
        record, bias = self.matrices[role], role + ".bias"
        attributes = {"K": record.columns, "N": record.rows, "bits": record.bits, "block_size": record.block}
        codes, scales, *offsets = self._matrix(role)
        terms = [self.parts.vector(bias)] if bias in self.parts.vectors else []
        if offsets:
            sums = self._block_sums(x, record)
            terms = [self.parts.node("Gemm", [sums, offsets[0], *terms], [output + ".offset"], transB=1)]
        if not terms:
            return self._scaled(scale, "MatMulNBits", [x, codes, scales], output, MICROSOFT, **attributes)
        product = self.parts.node("MatMulNBits", [x, codes, scales], [output + ".product"], MICROSOFT, **attributes)
        return self._scaled(scale, "Add", [product, *terms], output)

    def attention(self, query: str, key: str, value: str, layer: int, output: str) -> str:
        spec, parts, window = self.spec, self.parts, windows_of(self.spec)[layer]
        rope = spec.layer_rope(layer)
        self._observe(query, layer)
        batched = [
            self._batched(self._rotated(query, rope, output + ".query", spec.heads), output + ".query"),
            self._batched(self._rotated(key, rope, output + ".key", spec.kv_heads), output + ".key"),
            self._batched(value, output + ".value"),
        ]
        past, present = ([state_name(when, layer, what) for what in ("key", "value")] for when in ("past", "present"))
        attended = parts.node(
            "GroupQueryAttention", [*batched, *past, *self._lengths(layer)], [output + ".batched", *present], MICROSOFT,
            num_heads=spec.heads, kv_num_heads=spec.kv_heads, scale=float(spec.attention_scale),
            softcap=float(spec.attention_softcap), local_window_size=window or -1, do_rotary=0,
        )  # fmt: skip
        return parts.node("Squeeze", [attended, self._number("axis.0", 0)], [output])

    def gated_unit(self, gate: str, up: str, output: str) -> str:
        node = self.parts.node
        if self.spec.activation == "gelu_tanh":
            bent = node("Gelu", [gate], [output + ".bent"], approximate="tanh")
        else:
            bent = node("Mul", [gate, node("Sigmoid", [gate], [output + ".sigmoid"])], [output + ".bent"])
        return node("Mul", [bent, up], [output])

    def experts(self, x: str, router: str, layer: int, output: str) -> str:  # noqa: ARG002
        raise ModelError("the portable flavour has no mixture of experts; use --flavour native")

    def state(self) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        spec = self.spec
        found: dict[str, list[onnx.ValueInfoProto]] = {"past": [], "present": []}
        for layer in range(spec.layers):
            for when, infos in found.items():
                for what in ("key", "value"):
                    dims: list[int | str] = [1, spec.kv_heads, f"{when}_tokens_{layer}", spec.head_size]
                    infos.append(_floats(state_name(when, layer, what), dims))
                width = spec.heads * spec.head_size
                infos.append(_floats(state_name(when, layer, "queries"), [f"{when}_queries_{layer}", width]))
        return found["past"], found["present"]

    def _matrix(self, role: str, *, three_dimensions: bool = False) -> list[str]:
        """Codes, scales and, if it has them, offsets; the embedding's gather wants factors of 3 dimensions."""
        record, external = self.matrices[role], self.parts.external
        rows, blocks = record.rows, record.columns // record.block
        places = matrix_parts(rows, record.columns, record.bits, record.block, record.has_min, record.offset)
        found = [external(role, TensorProto.UINT8, [rows, blocks, record.block * record.bits // 8], places.codes)]
        dims, end = ([rows, blocks, 1], "_3d") if three_dimensions else ([rows, blocks], "")
        for name, place in (("scales", places.scales), ("offsets", places.offsets)):
            if place is not None:
                found.append(external(f"{role}.{name}{end}", TensorProto.FLOAT, dims, place))
        return found

    def _block_sums(self, x: str, record: MatrixRecord) -> str:
        """The sum of each block of x: float32 [T, blocks], made once for all matrices that read x."""
        name = f"{x}.sums_{record.block}"
        if name not in self._made:
            self._made.add(name)
            dims = np.array([-1, record.columns // record.block, record.block], np.int64)
            shape = self.parts.constant(f"shape.blocks_{record.columns}_{record.block}", dims)
            split = self.parts.node("Reshape", [x, shape], [name + ".split"])
            self.parts.node("ReduceSum", [split, self._number("axis.2", 2)], [name], keepdims=0)
        return name

    def _scaled(
        self, scale: float, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: int
    ) -> str:
        """The node, its output times ``scale``."""
        if scale == 1:
            return self.parts.node(kind, inputs, [output], domain, **attributes)
        plain = self.parts.node(kind, inputs, [output + ".unscaled"], domain, **attributes)
        return self.parts.node(
            "Mul", [plain, self.parts.constant(f"scale.{scale}", np.array(scale, np.float32))], [output]
        )

    def _number(self, name: str, value: int) -> str:
        return self.parts.constant(name, np.array([value], np.int64))

    def _batched(self, x: str, output: str) -> str:
        return self.parts.node("Unsqueeze", [x, self._number("axis.0", 0)], [output + ".batched"])

    def _rotated(self, x: str, rope: RopeSpec | None, output: str, heads: int) -> str:
        if rope is None:
            return x
        part = rope.dims if rope.dims < self.spec.head_size else 0
        batched = self._batched(x, output + ".unrotated")
        turned = self.parts.node(
            "RotaryEmbedding", [batched, self._number("first_row", 0), *self._turns(rope)], [output + ".turned"],
            MICROSOFT, num_heads=heads, rotary_embedding_dim=part, interleaved=0,
        )  # fmt: skip
        return self.parts.node("Squeeze", [turned, self._number("axis.0", 0)], [output + ".rotated"])

    def _turns(self, rope: RopeSpec) -> list[str]:
        """Cosine and sine of each token's angles, float32 [T, rotated dimensions / 2], made once for each RoPE."""
        at = "rope.window." if rope is self.spec.window_rope else "rope.all."
        names = [at + "cosine", at + "sine"]
        if at in self._made:
            return names
        self._made.add(at)
        parts, node = self.parts, self.parts.node
        far, near, factor = (parts.constant(at + name, values) for name, values in rope_constants(rope).items())
        step = parts.constant("rope.step", np.array(POSITION_STEP, np.float32))
        if "rope.positions" not in self._made:
            self._made.add("rope.positions")
            column = node("Unsqueeze", ["positions", self._number("axis.1", 1)], ["rope.column"])
            place = node("Cast", [column], ["rope.positions"], to=TensorProto.FLOAT)
            steps = node("Floor", [node("Div", [place, step], ["rope.quotient"])], ["rope.steps"])
            node("Sub", [place, node("Mul", [steps, step], ["rope.whole"])], ["rope.rest"])
        angles = node(
            "Add",
            [
                node("Mul", ["rope.steps", far], [at + "large"]),
                node("Mul", ["rope.rest", near],
                     [at + "small"]),
            ],
            [at + "angles"],
        )  # fmt: skip
        for name, kind in zip(names, ("Cos", "Sin"), strict=True):
            node("Mul", [node(kind, [angles], [name + ".plain"]), factor], [name])
        return names

    def _lengths(self, layer: int) -> list[str]:
        """The last slot and the number of slots after this run; layers that are pruned alike share them."""
        windowed = bool(windows_of(self.spec)[layer])
        at = "length.window." if windowed else "length.all."
        if at not in self._made:
            self._made.add(at)
            node = self.parts.node
            past = node("Shape", [state_name("past", layer, "key")], [at + "past"], start=2, end=3)
            total = node("Add", [past, node("Shape", ["input_ids"], [at + "new"])], [at + "row"])
            last = node("Sub", [total, self._number("one", 1)], [at + "last"])
            node("Cast", [last], [at + "last_slot"], to=TensorProto.INT32)
            scalar = node("Squeeze", [total], [at + "scalar"])
            node("Cast", [scalar], [at + "total"], to=TensorProto.INT32)
        return [at + "last_slot", at + "total"]

    def _observe(self, query: str, layer: int) -> None:
        """The state's queries: those of before and the new ones, the last of them."""
        joined = self.parts.node(
            "Concat", [state_name("past", layer, "queries"), query], [f"layers.{layer}.queries.joined"], axis=0
        )
        self.parts.node(
            "Slice",
            [joined, self._number(OBSERVED, -OBSERVED_QUERIES), self._number("end", LAST), self._number("axis.0", 0)],
            [state_name("present", layer, "queries")],
        )


def rope_constants(rope: RopeSpec) -> dict[str, npt.NDArray[np.float32]]:
    """What angles are made of, by the ends of the initializers' names (``rope.all.`` or ``rope.window.`` before them):
    ``far`` and ``near`` float32 [1, rotated dimensions / 2], radians per step of positions and per one; ``factor``.
    """
    frequencies = rope_frequencies(rope).astype(np.float64)[None]
    far = np.fmod(frequencies * POSITION_STEP, 2 * np.pi)
    return {
        "far": far.astype(np.float32),
        "near": frequencies.astype(np.float32),
        "factor": np.array(rope.attention_factor, np.float32),
    }


def _floats(name: str, dims: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
