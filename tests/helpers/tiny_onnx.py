"""Graphs as Optimum 2.1 (torch 2.13) exports decoders: the same names of nodes and initializers around given weights.

Only what a reader of weights could look at is there: the nodes that weights go into, and the inputs and outputs. The
graphs cannot be run. ``benchmarks/optimum_folders.py`` makes real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper
from tiny_folders import encode, tiny_tensors, write_tiny_folder

ONNX_TYPES = {"F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16, "BF16": onnx.TensorProto.BFLOAT16}
Floats = npt.NDArray[np.float32]


class GraphWriter:
    """Nodes and initializers, one weight after the other."""

    def __init__(self, dtype: str, folded: bool, norm_shift: float) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._dtype = dtype
        self._folded = folded
        self._shift = norm_shift
        self._by_value: dict[bytes, str] = {}

    def initializer(self, name: str, values: Floats, dtype: str | None = None) -> str:
        dtype = dtype or self._dtype
        raw = encode(np.ascontiguousarray(values), dtype)
        self.initializers[name] = helper.make_tensor(name, ONNX_TYPES[dtype], values.shape, raw, raw=True)
        return name

    def node(self, operator: str, name: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Adds a node; the name of its output, which torch makes of the node's."""
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def weight(self, name: str, values: Floats) -> None:
        """One of the model's tensors with what torch makes of it."""
        module, _, kind = name.rpartition(".")
        path = "/" + module.replace(".", "/").replace("/layers/", "/layers.").replace("/experts/", "/experts.")
        if kind == "bias":
            self.node("Add", f"{path}/Add", self._vector(name, values), f"{path}/MatMul_output_0")
        elif name.endswith("embed_tokens.weight"):
            self.node("Gather", f"{path}/Gather", self.initializer(name, values), "input_ids")
        elif values.ndim == 2:
            self._matrix(name, path, values)
        else:
            self._norm(name, path, values)

    def _vector(self, name: str, values: Floats) -> str:
        """An initializer, or the one that has the same values: torch keeps one of them."""
        key = values.tobytes()
        if key in self._by_value:
            return self.node("Identity", f"Identity_{len(self.nodes)}", self._by_value[key], output=name)
        self._by_value[key] = name
        return self.initializer(name, values)

    def _matrix(self, name: str, path: str, values: Floats) -> None:
        if self._folded:
            turned = self.initializer(f"onnx::MatMul_{700 + len(self.nodes)}", values.T)
        else:
            turned = self.node("Transpose", f"{path}/Transpose", self.initializer(name, values), perm=[1, 0])
        self.node("MatMul", f"{path}/MatMul", "hidden", turned)

    def _norm(self, name: str, path: str, values: Floats) -> None:
        if not self._shift:
            self.node("Mul", f"{path}/Mul_1", self._vector(name, values), f"{path}/Cast_1_output_0")
        elif self._folded:
            whole = self.initializer(f"onnx::Mul_{700 + len(self.nodes)}", values + np.float32(self._shift), "F32")
            self.node("Mul", f"{path}/Mul_1", f"{path}/Mul_output_0", whole)
        else:
            cast = self.node("Cast", f"{path}/Cast_1", self._vector(name, values), to=1)
            self.initializer(f"{path}/Constant", np.float32(self._shift).reshape(()), "F32")
            whole = self.node("Add", f"{path}/Add_1", cast, f"{path}/Constant")
            self.node("Mul", f"{path}/Mul_1", f"{path}/Mul_output_0", whole)

    def tied_output(self, embedding: str) -> None:
        """The embedding again; where constants are folded, Optimum ties it after the export."""
        name = f"Transpose_{len(self.nodes)}" if self._folded else "/lm_head/Transpose"
        turned = self.node("Transpose", name, embedding, perm=[1, 0])
        self.node("MatMul", "/lm_head/MatMul", "hidden", turned)


def optimum_graph(
    tensors: Mapping[str, Floats], *, dtype: str = "F32", folded: bool = True, norm_shift: float = 0.0,
    merged: bool = False,
) -> onnx.ModelProto:  # fmt: skip
    """A decoder with past around ``tensors``, which have their Hugging Face names.

    Args:
        dtype: of the weights.
        folded: constants are folded (the default of Optimum), so that matrices lie transposed under other names.
        norm_shift: what the graph adds to the weights of norms; folded into them, too.
        merged: as one of the two branches of a graph, which older versions of Optimum made.
    """
    writer = GraphWriter(dtype, folded, norm_shift)
    for name, values in tensors.items():
        writer.weight(name, values)
    if "lm_head.weight" not in tensors:
        writer.tied_output("model.embed_tokens.weight")
    nodes, tied = writer.nodes, list(writer.initializers.values())
    numbers = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None)
              for name in ("input_ids", "attention_mask", "position_ids", *numbers)]  # fmt: skip
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
               for name in ("logits", *(name.replace("past_key_values", "present") for name in numbers))]  # fmt: skip
    if merged:
        names = {tensor.name: f"{tensor.name}_merged_0" for tensor in tied}
        for node in nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
        for tensor in tied:
            tensor.name = names[tensor.name]
        branches = [helper.make_graph(nodes, name, [], outputs) for name in ("with_past", "no_past")]
        nodes = [helper.make_node("If", ["use_cache_branch"], [output.name for output in outputs], name="optimum::if",
                                  then_branch=branches[0], else_branch=branches[1])]  # fmt: skip
        inputs.append(helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1]))
    return helper.make_model(helper.make_graph(nodes, "main_graph", inputs, outputs, tied), producer_name="pytorch")


def save_graph(folder: Path, model: onnx.ModelProto, name: str = "model.onnx", *, external: bool = False) -> Path:
    """Writes the graph in place of the folder's safetensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    path = folder / name
    if external:
        onnx.save_model(model, path, save_as_external_data=True, location=f"{name}_data", size_threshold=1024)
    else:
        path.write_bytes(model.SerializeToString())
    return path


def write_optimum_folder(
    folder: Path, kind: str = "llama", *, tied: bool = True, dtype: str = "F32", folded: bool = True,
    merged: bool = False, external: bool = False, name: str = "model.onnx",
) -> Path:  # fmt: skip
    """The folder of `write_tiny_folder` as Optimum would export it."""
    write_tiny_folder(folder, kind, tied=tied)
    graph = optimum_graph(tiny_tensors(kind, tied=tied), dtype=dtype, folded=folded, merged=merged)
    save_graph(folder, graph, name, external=external)
    return folder
