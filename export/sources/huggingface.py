"""A Hugging Face model folder as a source: config.json, a tokenizer, and weights in safetensors or an ONNX graph.

Read without ``torch`` and ``transformers``, tensor by tensor with plain file reads; no code from the folder is
run, ever (``auto_map`` in a config is not looked at). Weights in float32, float16 and bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from ...errors import ModelError
from .base import FileTensor, Source, SourceTensor, TokenizerFiles
from .folder import ModelFolder
from .hf_config import Translation, translate_config
from .hf_record import Record
from .optimum import OptimumGraph
from .safetensors import read_safetensors
from .views import memory_tensor

CONFIG_FILE = "config.json"
MAX_TOKENIZER_BYTES = 128 << 20  # Gemma's has 33 MB
# beside config and weights: what changes the package when it changes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def is_huggingface(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face model's."""
    return (path / CONFIG_FILE).is_file()


def open_huggingface(path: Path) -> Source:
    """Opens and checks a model folder; reads only its records and the headers of its weights.

    Raises:
        ModelError: a file is missing, damaged or a link out of the folder, or the model is of no kind that is
            known.
    """
    folder = ModelFolder(path)
    if folder.find(CONFIG_FILE) is None:
        raise _no_model(path)
    values = folder.read_record(CONFIG_FILE, required=True)
    translation = translate_config(Record(values, path / CONFIG_FILE), folder.name)
    names, places = folder.weight_files()
    with contextlib.ExitStack() as stack:
        found: Mapping[str, SourceTensor]
        if names[0].endswith(".onnx"):
            graph = OptimumGraph(folder, names[0], stack)
            found = graph.tensors(translation.names.norm_shift)
            names, files = list(graph.files), list(graph.files.values())
        else:
            files = [stack.enter_context(folder.open(name)) for name in names]
            found = _safetensors(folder, names, files, places)
        tensors = _translated(folder, found, translation)
        index = ["model.safetensors.index.json"] if places else []
        every = [CONFIG_FILE, *TOKENIZER_FILES, *index, *names]
        paths = [file for name in every if (file := folder.find(name)) is not None]
        source = Source(
            path, folder.name, paths, files, translation.metadata, tensors, tokenizer=_tokenizer(folder, values)
        )
        stack.pop_all()
    return source


def _no_model(path: Path) -> ModelError:
    """What to say of a folder without a config."""
    found = sorted(path.glob("*.gguf"))
    remedy = f"give the path of its .gguf file: {found[0]}" if found else "give a .gguf file or such a folder"
    return ModelError(
        f"{path} is a folder without {CONFIG_FILE}: neither a Hugging Face model nor a package of ours; {remedy}"
    )


def _safetensors(
    folder: ModelFolder, names: list[str], files: list[FileIO], places: dict[str, str]
) -> dict[str, FileTensor]:
    """Hugging Face name -> tensor."""
    found: dict[str, FileTensor] = {}
    for name, file in zip(names, files, strict=True):
        for tensor_name, tensor in read_safetensors(folder.path / name, file).items():
            if tensor_name in found:
                other = found[tensor_name].path.name
                raise ModelError(f"{folder.path}: {tensor_name[:100]!r} is in {other} and in {name}; download it again")
            if places and places.get(tensor_name, name) != name:
                raise ModelError(
                    f"{folder.path}: {tensor_name[:100]!r} is in {name}, the index says {places[tensor_name]}"
                    "; download it again"
                )
            found[tensor_name] = tensor
    lost = next((name for name in places if name not in found), None)
    if lost is not None:
        raise ModelError(
            f"{folder.path}: {places[lost]} has no tensor {lost[:100]!r}, which the index puts there; download it again"
        )
    return found


def _translated(
    folder: ModelFolder, found: Mapping[str, SourceTensor], translation: Translation
) -> dict[str, SourceTensor]:
    """GGUF name -> tensor, of a type that can be read."""
    tensors = translation.names.translate(found, folder.path)
    for ours, view in tensors.items():
        if not view.type_name:
            raise ModelError(
                f"{view.path}: tensor {view.name[:100]!r} ({ours}) is neither float32 nor float16 nor bfloat16; "
                "use a model in one of these"
            )
        if not view.size:
            raise ModelError(f"{view.path}: tensor {view.name[:100]!r} has the shape {list(view.shape)}: it is empty")
    for ours, factors in translation.factors.items():
        tensors[ours] = memory_tensor(ours, factors, folder.path / CONFIG_FILE)
    return tensors


def _tokenizer(folder: ModelFolder, config: dict[str, Any]) -> TokenizerFiles | None:
    path = folder.find("tokenizer.json")
    if path is None:
        return None
    template = None
    if folder.find("chat_template.jinja") is not None:
        try:
            template = folder.read("chat_template.jinja").decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{folder.path / 'chat_template.jinja'} is not UTF-8; download it again") from None
    return TokenizerFiles(
        path,
        lambda: folder.read("tokenizer.json", MAX_TOKENIZER_BYTES),
        folder.read_record("tokenizer_config.json"),
        folder.read_record("generation_config.json"),
        config,
        template,
    )
