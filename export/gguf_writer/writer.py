"""Writes a source as one .gguf file, tensor by tensor, into a temporary file that is renamed at the end.

The ``gguf`` package writes header and keys; tensors are streamed past it, a few rows at a time, so that the memory
of an export does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf.gguf_writer import WriterState

from ...devices.files.safe_write import remove_stale, temporary_file
from ...devices.reporting import Notice, Progress, log_notice, no_progress
from ...errors import ModelError, OptionError, StorageError
from ..architectures import DecoderModel, read_model
from ..ready_tokenizer import ready_tokenizer
from ..sources import Source, open_source
from ..sources.gguf import MAGIC, GgufMetadata
from .metadata import Value, copied_keys, own_keys, translated_keys, typed
from .tensors import FLOAT, PlannedTensor, plan_tensors
from .vocabulary import tokenizer_keys

BITS = (4, 8)
HEADER_BYTES = 64 << 20  # allowance for keys and vocabulary in the check of free space
FILE_TYPES = {8: gguf.LlamaFileType.MOSTLY_Q8_0, 4: gguf.LlamaFileType.MOSTLY_Q4_0}
QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class GgufFile:
    """What was written: ``carried`` tensors have the bytes of the source, ``rounded`` ones were quantized."""

    path: Path
    bytes: int
    carried: int
    rounded: int


def export_gguf(
    source: Path,
    out: Path,
    *,
    bits: int = 8,
    kv: Mapping[str, int | str] | None = None,
    progress: Progress | None = None,
    notice: Notice = log_notice,
) -> GgufFile:
    """Writes a model as one GGUF file that stock llama.cpp loads, replacing an older .gguf file there.

    Args:
        source: a .gguf file (of a split one the first part) or a Hugging Face folder.
        out: the file; its name ends in .gguf.
        bits: 8 keeps quantized matrices as they are and rounds others to Q8_0; 4 rounds the layers' matrices of
            more than 4 bits to Q4_0.
        kv: settings of the KV cache, kept under ``satchel.kv.``; checked by the caller.
        progress: called with the stages ``checking`` and ``exporting``, in bytes.

    Raises:
        ModelError: the source cannot be used, or llama.cpp cannot run it.
        OptionError: ``bits`` is not known.
        StorageError: ``out`` is something else than a .gguf file, or the disk cannot take it.
    """
    if bits not in BITS:
        raise OptionError(f"bits is {bits}; supported: {', '.join(map(str, BITS))}")
    _check_name(out)
    with open_source(source) as opened:
        _check_place(out, opened)
        return _write(opened, out.absolute(), bits, dict(kv or {}), progress or no_progress, notice)


def _check_name(out: Path) -> None:
    if out.suffix != ".gguf":
        raise StorageError(f"{out} does not end in .gguf; name the file {out.name or 'model'}.gguf")


def _check_place(out: Path, source: Source) -> None:
    """Refuses a place where something lies that an export must not replace."""
    try:
        if not out.exists():
            return
        if any(out.samefile(path) for path in source.paths):
            raise StorageError(f"{out} is the model that is to be exported; name another file")
        if not out.is_file():
            raise StorageError(f"{out} exists and is not a file; name another file")
        with out.open("rb") as file:
            head = file.read(len(MAGIC))
    except OSError as error:
        raise StorageError(f"{out} cannot be used ({error.strerror}); name another file") from None
    if head != MAGIC:
        raise StorageError(f"{out} exists and is not a GGUF file; name another file or remove it")


def _write(
    source: Source, out: Path, bits: int, kv: dict[str, int | str], progress: Progress, notice: Notice
) -> GgufFile:
    """Looks at all that may be refused before the source is hashed or a byte is written."""
    model = read_model(source)
    planned = plan_tensors(source, model, bits)
    keys, advice = _keys(source, model, planned, bits)
    sha256 = source.hash(progress)
    keys |= {key: typed(value) for key, value in own_keys(source, bits, kv, sha256).items()}
    total = sum(tensor.size for tensor in planned)
    with temporary_file(out, bytes_needed=total + HEADER_BYTES) as file:
        writer = _write_header(file, source.architecture, keys, planned)
        done = 0
        for tensor in planned:
            start = file.tell()
            for chunk in tensor.chunks():
                file.write(chunk.data)
                done += chunk.size
                progress("exporting", done, total)
            assert file.tell() - start == tensor.size
            writer.write_padding(file, tensor.size)
        size = file.tell()
    remove_stale(out.parent)
    for line in advice:
        notice(line)
    rounded = _rounded(planned)
    return GgufFile(out, size, len(planned) - rounded, rounded)


def _keys(
    source: Source, model: DecoderModel, planned: list[PlannedTensor], bits: int
) -> tuple[dict[str, Value], list[str]]:
    """(all keys but those of our own making, what a person should know)"""
    advice: list[str] = []
    if isinstance(source.metadata, GgufMetadata):
        keys = dict(copied_keys(source.metadata))
    else:
        plain, advice = translated_keys(source, model)
        ready = ready_tokenizer(source, model.spec.vocab)
        if source.tokenizer is None or ready is None:
            raise ModelError(f"{source.path} has no tokenizer; use another model")
        plain |= tokenizer_keys(ready, model.spec.vocab, str(source.tokenizer.path))
        del plain["general.architecture"]  # the library writes it
        keys = {key: typed(value) for key, value in plain.items()}
    if _rounded(planned) or "general.file_type" not in keys:
        keys["general.file_type"] = Value(int(FILE_TYPES[bits]), gguf.GGUFValueType.UINT32)
    keys["general.quantization_version"] = Value(QUANTIZATION_VERSION, gguf.GGUFValueType.UINT32)
    return keys, advice


def _rounded(planned: list[PlannedTensor]) -> int:
    return sum(tensor.kind != FLOAT and not tensor.carried for tensor in planned)


def _write_header(
    file: BinaryIO, architecture: str, keys: Mapping[str, Value], planned: list[PlannedTensor]
) -> gguf.GGUFWriter:
    """Everything before the tensors' bytes, padded; the library's writer, which knows the alignment."""
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in keys.items():
        if value.array:
            writer.add_key_value(key, value.value, gguf.GGUFValueType.ARRAY, sub_type=value.kind)
        else:
            writer.add_key_value(key, value.value, value.kind)
    for tensor in planned:
        shape = tensor.source.shape
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.kind)
    writer.fout, writer.state = [file], WriterState.EMPTY  # our file, which is open already
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(file, file.tell())
    return writer
