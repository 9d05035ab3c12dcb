"""The decoder in plain NumPy float32, slow and obvious: what every runtime's logits are compared with.

Nothing here is shared with the code under test but the spec: weights from a GGUF file come through
``gguf.dequantize``, those from a package through ``unpack``, the slow twin of the packed layout; the rotary
angles are worked out here again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from satchel.export.packing import unpack
from satchel.export.sources import open_source
from satchel.export.spec import ModelSpec, RopeSpec

Floats = npt.NDArray[np.float32]


class ReferenceModel:
    """``weights`` by role: ``embedding``, ``layers.0.query``, ``layers.0.query.bias``…: float32 [out, in]."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Floats]) -> None:
        self.spec = spec
        self.weights = weights
        self.angles = _radians_per_position(spec.rope)

    def logits(self, ids: Sequence[int], positions: Sequence[int] | None = None) -> Floats:
        """float32 [T, vocab]: row t follows from ids 0 … t. Full causal attention, no cache."""
        spec = self.spec
        place = np.arange(len(ids)) if positions is None else np.asarray(positions)
        x = self.weights["embedding"][np.asarray(ids)]
        for layer in range(spec.layers):
            at = f"layers.{layer}."
            x = x + self._attention(self._norm(x, at + "attention_norm"), at, place)
            normed = self._norm(x, at + "feed_forward_norm")
            gate, up = self._linear(normed, at + "gate"), self._linear(normed, at + "up")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, at + "down")
        last = self._norm(x, "output_norm")
        return self._linear(last, "embedding" if spec.tied_embeddings else "output")

    def _linear(self, x: Floats, role: str) -> Floats:
        y = x @ self.weights[role].T
        return y + self.weights[role + ".bias"] if role + ".bias" in self.weights else y

    def _norm(self, x: Floats, role: str) -> Floats:
        return (
            x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.spec.norm_epsilon) * self.weights[role]
        )

    def _rotate(self, x: Floats, positions: npt.NDArray[np.intp]) -> Floats:
        """x [T, heads, D]; dimension i turns with dimension i + dims/2."""
        angle = positions[:, None, None] * self.angles
        factor = self.spec.rope.attention_factor
        cosine, sine = np.cos(angle) * factor, np.sin(angle) * factor
        half = self.spec.rope.dims // 2
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = [first * cosine - second * sine, second * cosine + first * sine, rest]
        return np.concatenate(turned, axis=-1).astype(np.float32)

    def _attention(self, x: Floats, at: str, positions: npt.NDArray[np.intp]) -> Floats:
        spec, tokens = self.spec, len(x)
        window = spec.attention_windows[int(at.split(".")[1])]
        q = self._rotate(self._linear(x, at + "query").reshape(tokens, spec.heads, -1), positions)
        k = self._rotate(self._linear(x, at + "key").reshape(tokens, spec.kv_heads, -1), positions)
        v = self._linear(x, at + "value").reshape(tokens, spec.kv_heads, -1)
        out = np.empty_like(q)
        allowed = positions[None, :] <= positions[:, None]
        if window:
            allowed &= positions[None, :] > positions[:, None] - window
        for head in range(spec.heads):
            group = head * spec.kv_heads // spec.heads
            scores = q[:, head] @ k[:, group].T * spec.attention_scale
            if spec.attention_softcap:
                scores = np.tanh(scores / spec.attention_softcap) * spec.attention_softcap
            scores = np.where(allowed, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[:, group]
        return self._linear(out.reshape(tokens, -1), at + "attention_output")


def reference_from_package(folder: Path) -> ReferenceModel:
    """The model with exactly the weights that a package holds."""
    manifest = json.loads((folder / "satchel.json").read_text(encoding="utf-8"))
    data = np.memmap(folder / "model.onnx.data", np.uint8, mode="r")
    weights = {}
    for record in manifest["matrices"]:
        packed = data[record["offset"] : record["offset"] + record["bytes"]]
        weights[record["role"]] = unpack(
            np.ascontiguousarray(packed), record["rows"], record["columns"], record["bits"], record["block"],
            record["has_min"], record["multiplier"],
        )  # fmt: skip
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            weights[tensor.name] = numpy_helper.to_array(tensor)
    return ReferenceModel(ModelSpec.from_json(manifest["spec"]), weights)


GGUF_NAMES = {
    "attn_norm": "attention_norm", "ffn_norm": "feed_forward_norm", "attn_q": "query", "attn_k": "key",
    "attn_v": "value", "attn_output": "attention_output", "ffn_gate": "gate", "ffn_up": "up",
    "ffn_down": "down",
}  # fmt: skip


def reference_from_gguf(path: Path, spec: ModelSpec) -> ReferenceModel:
    """The model with the weights of a GGUF file as ``gguf`` dequantizes them; embedding and output as the
    file has.
    """
    weights: dict[str, Floats] = {}
    with open_source(path) as source:
        spec_heads = {"attn_q": spec.heads, "attn_k": spec.kv_heads}
        for name, tensor in source.tensors.items():
            kind = gguf.GGMLQuantizationType[tensor.type_name]
            values = gguf.dequantize(tensor.read_rows(0, tensor.rows), kind).astype(np.float32)
            values = values.reshape(tensor.shape)
            parts = name.split(".")
            if parts[0] != "blk":
                weights[{"token_embd": "embedding"}.get(parts[0], parts[0])] = values
                continue
            if spec.architecture == "llama" and parts[2] in spec_heads:
                pairs = values.reshape(spec_heads[parts[2]], -1, 2, *values.shape[1:])
                values = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(values.shape)
            suffix = ".bias" if parts[3] == "bias" else ""
            weights[f"layers.{parts[1]}.{GGUF_NAMES[parts[2]]}{suffix}"] = values
    model = ReferenceModel(spec, weights)
    if "output" in weights and spec.tied_embeddings:  # an exporter has found the two to be one matrix
        model.weights = {**weights, "embedding": weights["output"]}
    return model


def _radians_per_position(rope: RopeSpec) -> npt.NDArray[np.float64]:
    """One number per pair of dimensions, pair by pair from the definitions."""
    found = []
    for pair in range(rope.dims // 2):
        plain = rope.base ** (-2 * pair / rope.dims)
        turns = rope.original_context * plain / (2 * math.pi)  # within the original context
        value = plain
        if rope.scaling == "linear":
            value = plain / rope.factor
        elif rope.scaling == "llama3":
            if turns < rope.low_frequency_factor:
                value = plain / rope.factor
            elif turns < rope.high_frequency_factor:
                smooth = (turns - rope.low_frequency_factor) / (
                    rope.high_frequency_factor - rope.low_frequency_factor
                )
                value = (1 - smooth) * plain / rope.factor + smooth * plain
        elif rope.scaling == "yarn":
            scale = rope.dims / (2 * math.log(rope.base))
            low = scale * math.log(rope.original_context / (rope.beta_fast * 2 * math.pi))
            high = scale * math.log(rope.original_context / (rope.beta_slow * 2 * math.pi))
            low, high = max(math.floor(low), 0), min(math.ceil(high), rope.dims - 1)
            ramp = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
            value = plain / rope.factor * ramp + plain * (1 - ramp)
        if rope.frequency_factors:
            value /= rope.frequency_factors[pair]
        found.append(value)
    return np.array(found)
