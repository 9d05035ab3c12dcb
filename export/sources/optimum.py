"""The weights of an ONNX decoder that Optimum exported, under the names that the model's safetensors would have.

What the model is its config.json says, as in every Hugging Face folder; of the graph only the weights are taken, and
its attention and cache are replaced by ours. Norms, biases and the embedding keep their names there; matrices become
``onnx::MatMul_733``, transposed, and only the node that multiplies with one says which it is:
``/model/layers.0/self_attn/q_proj/MatMul``. So weights are found by their use: that tells how a matrix lies, too, and a
weight that equals another one, of which the exporter kept a single copy, has all its places.

The graph is neither run nor loaded as a whole (`protobuf`). Neither ``optimum`` nor ``onnxruntime`` is needed.
"""

from __future__ import annotations

import contextlib
import math
import re
from io import FileIO
from itertools import takewhile

from ...errors import ModelError
from .base import FileTensor, SourceTensor
from .folder import ModelFolder
from .onnx_graph import Initializer, Node, read_graph
from .onnx_scope import Scope, Use, all_scopes
from .views import BandReader, TransposedTensor, shifted_tensor

MATRIX_OPERATORS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
# operator -> which of its inputs may be a norm's weight
NORM_OPERATORS = {
    "Mul": (0, 1), "SimplifiedLayerNormalization": (1,), "RMSNormalization": (1,),
    "SkipSimplifiedLayerNormalization": (2,),
}  # fmt: skip
# beside all whose name has "quantize" in it
QUANTIZED = {
    "ConvInteger", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger", "MatMulIntegerToFloat",
    "MatMulNBits", "QAttention", "QGemm", "QLinearMatMul", "QMoE",
}  # fmt: skip
MODULE = re.compile(r"[a-z0-9_.]+")
VECTOR = re.compile(r"(.*\.)?(norm\.weight|layers\.\d+\.[a-z0-9_.]+\.(weight|bias))")
MERGED = re.compile(r"_merged_\d+$")  # what Optimum adds to the names in a graph of two
EMBEDDING = re.compile(r"(.*\.)?embed_tokens\.weight")
MAX_FILES = 64


class OptimumGraph:
    """The weights of one graph of a folder.

    Args:
        stack: closes the files.
    """

    def __init__(self, folder: ModelFolder, name: str, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._name = name
        self.path = folder.path / name
        self.files: dict[str, FileIO] = {}
        self._bands = BandReader()
        self._uses: dict[str, Use] = {}
        self._biases: list[tuple[str, Use]] = []
        self._graph = read_graph(self.path, self._file(name))

    def tensors(self, norm_shift: float) -> dict[str, SourceTensor]:
        """Hugging Face name -> tensor.

        Args:
            norm_shift: what the family's norms are short of in safetensors (Gemma: 1).

        Raises:
            ModelError: the graph is not a decoder's, its weights are quantized, or lie where they cannot be.
        """
        self._check_kind()
        scopes = list(all_scopes(Scope(self._graph)))
        for scope in scopes:
            for node in scope.graph.nodes:
                self._look_at(node, scope)
        for name, use in self._biases:
            if name.removesuffix(".bias") + ".weight" in self._uses:
                self._put(name, use)
        for scope in scopes:
            for name, use in scope.names():
                plain = MERGED.sub("", name)
                if VECTOR.fullmatch(plain) and len(use.tensor.shape) == 1:
                    self._uses.setdefault(plain, use)
        if not any(EMBEDDING.fullmatch(name) for name in self._uses):
            raise ModelError(
                f"{self.path} has no embedding of tokens under the names that Optimum gives "
                "(model.embed_tokens.weight); export the model with: optimum-cli export onnx"
            )
        found: dict[str, SourceTensor] = {}
        for name, use in self._uses.items():
            tensor = self._tensor(name, use)
            whole = use.whole and norm_shift and tensor.type_name
            found[name] = shifted_tensor(tensor, -norm_shift) if whole else tensor
        return found

    def _check_kind(self) -> None:
        inputs, outputs = self._graph.inputs, self._graph.outputs
        if "input_ids" not in inputs or "logits" not in outputs:
            raise ModelError(
                f"{self.path} is not a decoder (from {', '.join(inputs)[:80]!r} to {', '.join(outputs)[:80]!r}, "
                "not from input_ids to logits); export the model with: optimum-cli export onnx "
                "--task text-generation-with-past"
            )
        operators = {node.operator for scope in all_scopes(Scope(self._graph)) for node in scope.graph.nodes}
        quantized = sorted(name for name in operators if name in QUANTIZED or "quantize" in name.lower())
        if quantized:
            raise ModelError(
                f"{self.path} has quantized weights ({', '.join(quantized)[:100]}), which are not read; give the "
                "export without quantization (float32, float16 or bfloat16), or the model's .gguf"
            )

    def _look_at(self, node: Node, scope: Scope) -> None:
        """Notes the weights that a node uses."""
        module = _module(node.name)
        used = [scope.find(value) for value in node.inputs[:3]]
        if node.operator in MATRIX_OPERATORS and len(used) > 1:
            self._look_at_matrix(node, module, used[1])
            bias = used[2] if len(used) > 2 else None
            if bias is not None and module and len(bias.tensor.shape) == 1:
                self._biases.append((f"{module}.bias", bias))
        elif node.operator == "Gather" and used and used[0] is not None and len(used[0].tensor.shape) == 2:
            name = next(filter(EMBEDDING.fullmatch, (f"{module}.weight", used[0].tensor.name)), None)
            if name is not None:
                self._put(name, used[0])
        elif "norm" in module.rpartition(".")[2]:  # what is added there is an epsilon, or Gemma's 1
            for index in NORM_OPERATORS.get(node.operator, ()):
                use = used[index] if index < len(used) else None
                if use is not None and len(use.tensor.shape) == 1:
                    self._put(f"{module}.weight", Use(use.tensor, whole=True))
        elif node.operator == "Add" and module:
            self._biases += [(f"{module}.bias", use) for use in used if use is not None and len(use.tensor.shape) == 1]

    def _look_at_matrix(self, node: Node, module: str, use: Use | None) -> None:
        """``node`` multiplies with ``use``; [in, out] unless something turns it."""
        if use is None or len(use.tensor.shape) != 2:
            return
        shown = use.tensor.name[:100]
        if any(node.attributes.get("transA", [])) or node.attributes.get("alpha", [1.0]) != [1.0]:
            raise ModelError(
                f"{self.path}: {node.operator} does more with {shown!r} than multiply; "
                "export the model without --optimize"
            )
        name = f"{module}.weight" if module else use.tensor.name
        if not module and not name.endswith(".weight"):
            raise ModelError(
                f"{self.path}: which matrix {shown!r} is cannot be told, the {node.operator} with it has the name "
                f"{node.name[:100]!r}; export the model with: optimum-cli export onnx"
            )
        turned = use.transposed != any(node.attributes.get("transB", []))
        self._put(name, Use(use.tensor, transposed=not turned))

    def _put(self, name: str, use: Use) -> None:
        if self._uses.setdefault(name, use) != use:
            other = self._uses[name].tensor.name
            raise ModelError(
                f"{self.path}: {name[:100]!r} is both {other[:100]!r} and {use.tensor.name[:100]!r}; export it again"
            )

    def _tensor(self, name: str, use: Use) -> SourceTensor:
        """The weight in its file, where it must fit."""
        tensor = use.tensor
        shape = tensor.shape or (1,)
        if not tensor.type_name:  # the caller refuses it by this
            return FileTensor(name, "", shape, math.prod(shape), self.path, self._file(self._name), 0)
        file, (start, stop) = self._name, (tensor.start, tensor.stop)
        if tensor.external is not None:
            file, start, stop = self._external(tensor)
        elif start < 0:
            raise ModelError(
                f"{self.path}: the values of {tensor.name[:100]!r} are not one piece of bytes "
                "(raw_data); export it again"
            )
        if stop - start != tensor.size:
            raise ModelError(
                f"{self.path}: {tensor.name[:100]!r} of shape {list(shape)} takes {tensor.size} bytes but has "
                f"{stop - start}; export it again"
            )
        path, opened = self._folder.path / file, self._file(file)
        plain = FileTensor(name, tensor.type_name, shape, tensor.size, path, opened, start)
        if not use.transposed:
            return plain
        return TransposedTensor(name, plain.type_name, shape[::-1], plain.size, path, plain, self._bands)

    def _external(self, tensor: Initializer) -> tuple[str, int, int]:
        """(file, start, stop) of a weight that is not in the graph's file."""
        places = tensor.external or {}
        shown = f"{self.path}: {tensor.name[:100]!r}"
        file = places.get("location", "")
        opened = self._file(file)
        size = opened.seek(0, 2)
        texts = (places.get("offset", "0"), places.get("length", str(tensor.size)))
        if not all(re.fullmatch(r"[0-9]{1,18}", text) for text in texts):
            raise ModelError(f"{shown} lies at {texts[0][:40]!r} with {texts[1][:40]!r} bytes, which cannot be")
        start, length = map(int, texts)
        if start + length > size:
            raise ModelError(
                f"{shown} lies at {start} … {start + length} of {file[:100]!r}, which ends at {size}; download it again"
            )
        return file, start, start + length

    def _file(self, name: str) -> FileIO:
        if name not in self.files:
            if len(self.files) >= MAX_FILES:
                raise ModelError(
                    f"{self.path} has its weights in more than {MAX_FILES} files; save them in one "
                    "(onnx.save_model, all_tensors_to_one_file)"
                )
            self.files[name] = self._stack.enter_context(self._folder.open(name))
        return self.files[name]


def _module(name: str) -> str:
    """The module that a node is from: ``model.layers.0.mlp.up_proj`` of ``/model/layers.0/mlp/up_proj/MatMul``."""
    parts = takewhile(MODULE.fullmatch, name.removeprefix("/").split("/"))
    return ".".join(parts) if "/" in name.removeprefix("/") else ""
