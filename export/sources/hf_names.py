"""Hugging Face's names of tensors in GGUF's: one table for all families.

The canonical names are those of the ``gguf`` package (``gguf.MODEL_TENSORS``). Rows are left as they are: the
permutation of query and key rows that llama.cpp's converter does for some families is not done here, and
``Source.interleaved_rope`` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ModelError
from .base import FileTensor, SourceTensor
from .views import row_range, shifted_tensor, stacked_tensor

GLOBAL = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
ATTENTION = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}  # fmt: skip
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
FEED_FORWARD = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
SANDWICH_NORMS = {"input_layernorm": "attn_norm", **POST_NORMS, "pre_feedforward_layernorm": "ffn_norm"}
FUSED = {  # query, key and value in one; gate and up in one, gate first: as in GGUF
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
PLAIN = {**PRE_NORMS, **ATTENTION, **FEED_FORWARD}

# what old checkpoints carry along and the config says, and the parts of a model that reads pictures, too
IGNORED = re.compile(
    r".*\.rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias|(model\.)?(vision_tower|multi_modal_projector|vision_model)\..*"
)
PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|model\.|language_model\.(?=lm_head))")
LAYER = re.compile(r"layers\.(0|[1-9]\d{0,5})\.(.+)\.(weight|bias)")
EXPERT = re.compile(r"mlp\.experts\.(0|[1-9]\d{0,5})\.(gate_proj|up_proj|down_proj)")
FUSED_EXPERTS = re.compile(r"layers\.(0|[1-9]\d{0,5})\.mlp\.experts\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class TensorNames:
    """The names of one family: parts of a layer, and what its norms are short of (Gemma: 1)."""

    layer: Mapping[str, str] = field(default_factory=lambda: PLAIN)
    norm_shift: float = 0.0
    tied: bool | None = None  # an output matrix in the file is the embedding again; None: the config does not say

    def translate(self, tensors: Mapping[str, SourceTensor], path: Path) -> dict[str, SourceTensor]:
        """GGUF name -> tensor. A tensor without a GGUF name keeps its own: the architecture will refuse it.

        Raises:
            ModelError: two tensors have the same place, or an expert is missing.
        """
        found: dict[str, SourceTensor] = {}
        experts: dict[str, dict[int, SourceTensor]] = {}
        for name, tensor in tensors.items():
            plain = PREFIX.sub("", name)
            if IGNORED.fullmatch(name) or (self.tied and plain == "lm_head.weight"):
                continue
            match = LAYER.fullmatch(plain)
            if match and (expert := EXPERT.fullmatch(match[2])) and match[3] == "weight":
                place = f"blk.{match[1]}.{EXPERTS[expert[2]]}.weight"
                experts.setdefault(place, {})[int(expert[1])] = tensor
                continue
            for ours, view in self._views(name, plain, tensor):
                if ours in found:
                    raise ModelError(f"{path}: {name!r:.120} is a second tensor for {ours}; download the model again")
                found[ours] = view
        if self.tied is False and "token_embd.weight" in found and "output.weight" not in found:
            raise ModelError(
                f"{path} has no lm_head.weight, and its config does not set tie_word_embeddings; "
                "download the whole model"
            )
        for place, parts in experts.items():
            if place in found:
                raise ModelError(f"{path} has {place} both expert by expert and as one tensor; download it again")
            found[place] = _stack(place, parts, path)
        return found

    def _views(self, name: str, plain: str, tensor: SourceTensor) -> Iterator[tuple[str, SourceTensor]]:
        fused = FUSED_EXPERTS.fullmatch(plain)
        if fused and len(tensor.shape) == 3 and tensor.size and isinstance(tensor, FileTensor):
            yield from _split_experts(f"blk.{fused[1]}.", fused[2], tensor)
            return
        ours = self._name(plain) or name
        shifted = self.norm_shift and tensor.type_name and ours.endswith("norm.weight")
        yield ours, shifted_tensor(tensor, self.norm_shift) if shifted else tensor

    def _name(self, plain: str) -> str | None:
        if plain == "lm_head.weight":
            return "output.weight"
        match = LAYER.fullmatch(plain)
        if match is None:
            return GLOBAL.get(plain)
        part = self.layer.get(match[2])
        return None if part is None else f"blk.{match[1]}.{part}.{match[3]}"


def _stack(place: str, parts: Mapping[int, SourceTensor], path: Path) -> SourceTensor:
    missing = next((index for index in range(len(parts)) if index not in parts), None)
    if missing is not None:
        raise ModelError(f"{path} lacks expert {missing} of {place}; download the whole model")
    first = parts[0]
    for index in range(len(parts)):
        if (parts[index].shape, parts[index].type_name) != (first.shape, first.type_name):
            raise ModelError(f"{path}: experts 0 and {index} of {place} differ in shape or type; use another model")
    return stacked_tensor(place, [parts[index] for index in range(len(parts))])


def _split_experts(at: str, part: str, tensor: FileTensor) -> Iterator[tuple[str, SourceTensor]]:
    """All experts in one tensor [experts, rows, columns]; the first half of gate_up's rows is the gate."""
    count, rows, columns = tensor.shape
    if part == "down_proj":
        yield f"{at}ffn_down_exps.weight", tensor
        return
    half = rows // 2
    for index, ours in enumerate(("ffn_gate_exps", "ffn_up_exps")):
        starts = (expert * rows + index * half for expert in range(count))
        pieces = [row_range(tensor, start, (half, columns)) for start in starts]
        yield f"{at}{ours}.weight", stacked_tensor(tensor.name, pieces)
