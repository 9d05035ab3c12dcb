"""The keys of a GGUF file that llama.cpp reads, from the metadata of any source.

A GGUF source's keys are copied byte by byte. A Hugging Face folder presents some facts in keys of ours, because
llama.cpp has them in its code and not in files: these are left out where its code says the same, and where it does
not, the model is refused, as it would run there and answer wrongly. Windows are the exception: most families run in
llama.cpp without theirs, which only matters for long texts; a notice says so, and our key keeps the fact.

Facts: the files ``src/models/*.cpp`` of llama.cpp, tried out with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import gguf

from ...errors import ModelError
from ..architectures import DecoderModel, read_model
from ..architectures.keys import OWN_PREFIX
from ..architectures.layout import LONG_FACTORS, SHORT_FACTORS
from ..sources import Source
from ..sources.gguf import INTERLEAVED_ROPE, GgufMetadata
from ..spec import ModelSpec

FORMAT_VERSION = 1
# keys that not every family of llama.cpp reads -> the families that do; the other keys are read for all of them
READ_BY: dict[str, tuple[str, ...]] = {
    "attention.scale": ("granite",),
    "attention.sliding_window_pattern": (),  # a number for gemma3, see below
    "rope.freq_base_swa": ("gemma3",),
    "rope.layers": (),
    "expert_weights_norm": (),
}
WINDOWED = {"gemma2": 2, "gemma3": 6}  # families whose windows llama.cpp knows, and its usual period
# what llama.cpp's code takes for granted in these families
REQUIRED = {"gemma2": ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")}
DEFAULTS: dict[str, dict[str, Any]] = {"granite": {"logit_scale": 1.0}}
# of the source: parts that become one file, its alignment, and what an earlier export said of itself
DROPPED = ("split.", "general.alignment", "general.architecture", "satchel.format_version", "satchel.source_",
           "satchel.bits", "satchel.kv.")
LARGEST_UINT32, LARGEST_INT32 = (1 << 32) - 1, (1 << 31) - 1


@dataclass(frozen=True)
class Value:
    """A value with the GGUF type that it is written in; of an array, ``kind`` is that of its elements."""

    value: Any
    kind: gguf.GGUFValueType
    array: bool = False


def typed(value: Any) -> Value:
    """A Python value in the type that llama.cpp expects of such: whole numbers, none below 0, as uint32 (in
    arrays int32), others as float32.
    """
    first = value[0] if isinstance(value, list) else value
    if isinstance(first, bool):
        kind = gguf.GGUFValueType.BOOL
    elif isinstance(first, int):
        large = max(value) > LARGEST_INT32 if isinstance(value, list) else value > LARGEST_UINT32
        if isinstance(value, list):
            kind = gguf.GGUFValueType.INT64 if large else gguf.GGUFValueType.INT32
        else:
            kind = gguf.GGUFValueType.UINT64 if large else gguf.GGUFValueType.UINT32
    elif isinstance(first, float):
        kind = gguf.GGUFValueType.FLOAT32
    else:  # half a character, as in names of files that are no UTF-8, becomes a question mark
        kind = gguf.GGUFValueType.STRING
        encoded = [item.encode("utf-8", "replace") for item in (value if isinstance(value, list) else [value])]
        value = encoded if isinstance(value, list) else encoded[0]
    return Value(value, kind, isinstance(value, list))


def copied_keys(metadata: GgufMetadata) -> Iterator[tuple[str, Value]]:
    """The keys of a GGUF source as they are, without those that are about its files."""
    for key in metadata:
        kind, array, value = metadata.exact(key)
        if key.startswith(DROPPED) or (array and not value):  # the library writes no empty arrays
            continue
        yield key, Value(value, gguf.GGUFValueType(kind), array)


def translated_keys(source: Source, model: DecoderModel) -> tuple[dict[str, Any], list[str]]:
    """(keys of a folder's model for llama.cpp and, under ``satchel.``, for us; what a person should know).

    Raises:
        ModelError: llama.cpp would compute something else than this model.
    """
    family = source.architecture
    keys, extra = _split(source.metadata, family, model.spec.layers)
    _refuse_what_is_missing(source, keys, family)
    theirs = asdict(_read_again(source, keys))
    ours = asdict(model.spec)
    different = {name for name in ours if not _alike(ours[name], theirs[name])}
    refused = sorted(different - {"name"} - (set() if family in WINDOWED else {"attention_windows"}))
    if refused:
        name = refused[0]
        raise ModelError(
            f"{source.path}: llama.cpp has no key for the {name} of this {family} model ({ours[name]!r:.60}; it "
            f"would take {theirs[name]!r:.60}), so a GGUF file of it would answer wrongly; export it with --format onnx"
        )
    keys |= {f"{OWN_PREFIX}{key}": value for key, value in extra.items()} if different - {"name"} else {}
    return keys, list(_advice(source, model.spec))


def _advice(source: Source, spec: ModelSpec) -> Iterator[str]:
    """Where llama.cpp answers otherwise than we do, and people know it to."""
    if spec.architecture not in WINDOWED and any(spec.attention_windows):
        yield (
            f"llama.cpp does not know the sliding window of {spec.architecture} models: beyond "
            f"{max(spec.attention_windows)} tokens its answers will differ from Satchel's"
        )
    if {LONG_FACTORS, SHORT_FACTORS} <= source.tensors.keys() and spec.rope.original_context < spec.context_length:
        yield (
            f"llama.cpp takes LongRoPE's short factors for contexts of up to {spec.rope.original_context} tokens, "
            "where Satchel takes the long ones: answers will differ there"
        )


def own_keys(source: Source, bits: int, settings: Mapping[str, int | str], sha256: str) -> dict[str, Any]:
    """What the file says of its making, and the settings of the KV cache that a person gave."""
    return {
        f"{OWN_PREFIX}format_version": FORMAT_VERSION,
        f"{OWN_PREFIX}source_name": source.path.absolute().name,
        f"{OWN_PREFIX}source_sha256": sha256,
        f"{OWN_PREFIX}bits": bits,
        **{f"{OWN_PREFIX}kv.{key}": value for key, value in settings.items()},
    }


def _split(metadata: Mapping[str, Any], family: str, layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keys that llama.cpp reads, keys that it does not)"""
    keys = {f"{family}.{key}": value for key, value in DEFAULTS.get(family, {}).items()}
    extra: dict[str, Any] = {}
    for key, value in metadata.items():
        part = key.removeprefix(f"{family}.")
        known = part not in READ_BY or family in READ_BY[part]
        (keys if known else extra)[key] = value
    pattern = f"{family}.attention.sliding_window_pattern"
    period = _period(extra.get(pattern), layers)
    if family == "gemma3" and period is not None and period != WINDOWED[family]:
        keys[pattern] = period
    return keys, extra


def _period(windowed: Any, layers: int) -> int | None:
    """n, when every n-th layer and no other sees everything."""
    if not isinstance(windowed, list):
        return None
    periods = (n for n in range(1, layers + 2) if windowed == [(layer + 1) % n != 0 for layer in range(layers)])
    return next(periods, None)


def _refuse_what_is_missing(source: Source, keys: Mapping[str, Any], family: str) -> None:
    for part in REQUIRED.get(family, ()):
        if not keys.get(f"{family}.{part}"):
            raise ModelError(
                f"{source.path}: this {family} model has no {part}, and llama.cpp cannot do without it; export it "
                "with --format onnx"
            )


def _read_again(source: Source, keys: Mapping[str, Any]) -> ModelSpec:
    """The model that the keys describe: our readers take for granted what llama.cpp's code does."""
    seen = Source(source.path, source.name, source.paths, (), keys, source.tensors)
    spec = read_model(seen).spec
    if source.architecture in INTERLEAVED_ROPE and spec.rope.dims != spec.head_size:
        raise ModelError(
            f"{source.path}: llama.cpp has no rotary positions on {spec.rope.dims} of {spec.head_size} dimensions in "
            f"{source.architecture} models; export it with --format onnx"
        )
    return spec


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
