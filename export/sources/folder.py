"""The files of a model folder, opened so that a crafted folder can do no harm.

Everything in a folder that somebody downloaded may be meant ill: a name may lead elsewhere, a file may be a
pipe that never ends, a JSON text may nest without end. Nothing is ever run from it, whatever its config asks
for, and pickle files are not opened.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from io import FileIO
from pathlib import Path
from typing import Any

from ...errors import ModelError

MAX_CONFIG_BYTES = 16 << 20  # real ones have some kilobytes; an index of a very large model 5 MB
# what Optimum calls a decoder; of several the one that is sure to have all weights
GRAPHS = ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx", "decoder_model.onnx")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class ModelFolder:
    """A folder and the only ways in which its files are looked up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        real = path.resolve()
        self._roots = [real]
        # the hub's cache: models--org--name/snapshots/REVISION/* are links to models--org--name/blobs/*
        cached = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
        if cached:
            self._roots.append(real.parent.parent / "blobs")
        self.name = real.parent.parent.name.split("--")[-1] if cached else real.name

    def find(self, name: str) -> Path | None:
        """The path of a regular file of the folder, or None when there is no such file.

        Raises:
            ModelError: the name is not a plain one, leads out of the folder, or is no regular file's.
        """
        if not name or Path(name).name != name or "\\" in name or "\0" in name or name in (".", ".."):
            raise ModelError(
                f"{self.path} names the file {name[:100]!r}, which is not a plain file name; do not trust it"
            )
        path = self.path / name
        try:
            status = path.stat()
            real = path.resolve(strict=True)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, no UTF-8
            raise ModelError(f"{self.path}: {name[:100]!r} cannot be read ({type(error).__name__})") from None
        if not any(real.is_relative_to(root) for root in self._roots):
            raise ModelError(f"{path} is a link out of its folder, to {real}; put the file itself there")
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a regular file; put the model's file there")
        return path

    def open(self, name: str) -> FileIO:
        """Opens a file that must be there."""
        path = self.find(name)
        if path is None:
            raise ModelError(f"{self.path} has no {name}; download the whole model folder")
        try:
            return FileIO(path)
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); check its permissions") from None

    def read(self, name: str, limit: int = MAX_CONFIG_BYTES) -> bytes:
        """A small file that must be there, whole."""
        with self.open(name) as file:
            try:
                # a raw read makes room for all that is asked for
                data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
            except OSError as error:
                raise ModelError(f"{self.path / name} cannot be read ({error.strerror})") from None
        if len(data) > limit:
            raise ModelError(f"{self.path / name} has more than {limit >> 20} MiB, no such file has; download it again")
        return data

    def read_record(self, name: str, *, required: bool = False) -> dict[str, Any]:
        """A JSON file with an object in it; empty when it is not there and need not be."""
        if not required and self.find(name) is None:
            return {}
        return parse_record(self.read(name), self.path / name)

    def weight_files(self) -> tuple[list[str], dict[str, str]]:
        """(names of the safetensors files, or of one ONNX graph; tensor name -> file where an index says so)."""
        index = "model.safetensors.index.json"
        if self.find("model.safetensors") is not None:
            return ["model.safetensors"], {}
        if self.find(index) is not None:
            return self._indexed(index)
        try:
            found = sorted(path.name for path in self.path.glob("*.safetensors"))
            graphs = sorted(path.name for path in self.path.glob("*.onnx"))
            below = sorted(path.name for path in (self.path / "onnx").glob("*.onnx"))
            pickles = sorted(path.name for pattern in PICKLES for path in self.path.glob(pattern))
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({error.strerror}); check its permissions") from None
        if len(found) == 1 and not found[0].startswith("adapter_"):
            return found, {}
        if found:
            raise ModelError(
                f"{self.path} has {', '.join(map(repr, found[:3]))} but no model.safetensors and no {index}; "
                "download the whole model folder (adapters must be merged into their model first)"
            )
        if graphs:
            return [self._graph(graphs)], {}
        if below:
            raise ModelError(
                f"{self.path} has its weights in the folder 'onnx' ({below[0][:100]!r}); put config.json and "
                "tokenizer.json beside them, and give that folder"
            )
        if pickles:
            raise ModelError(
                f"{self.path} has its weights only as pickle files ({pickles[0]!r}), which can run code and are not "
                "opened; convert them where you trust them: AutoModelForCausalLM.from_pretrained(FOLDER)"
                ".save_pretrained(NEW_FOLDER, safe_serialization=True)"
            )
        raise ModelError(f"{self.path} has no weights (model.safetensors); download the whole model folder")

    def _graph(self, found: list[str]) -> str:
        """The graph with the weights, of those that Optimum writes into one folder."""
        name = next((name for name in GRAPHS if name in found), found[0])
        if name not in GRAPHS and len(found) > 1:
            raise ModelError(
                f"{self.path} has {', '.join(map(repr, found[:3]))}, and none of them is {GRAPHS[0]}; "
                "leave only the one to read, unquantized"
            )
        return name

    def _indexed(self, index: str) -> tuple[list[str], dict[str, str]]:
        where = self.path / index
        places = self.read_record(index, required=True).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ModelError(f"{where} has no weight_map from tensors to files; download it again")
        names = sorted(set(places.values()))
        bad = next((name for name in names if not name.endswith(".safetensors")), None)
        if bad is not None:
            raise ModelError(f"{where} names the file {bad[:100]!r}, which is not a safetensors file; do not trust it")
        missing = [name for name in names if self.find(name) is None]
        if missing:
            shown = ", ".join(repr(name[:100]) for name in missing[:3])
            shown += f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ModelError(f"{self.path} lacks {shown}, which {index} names; download the missing files")
        return names, places


def parse_record(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without duplicate keys.

    Raises:
        ModelError: it is something else, or nested too deeply.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ModelError(f"{path} has the key {twice[:100]!r} twice; download it again")
        return record

    try:
        value = json.loads(data, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise ModelError(f"{path} is not valid JSON ({detail}); download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} has no JSON object in it but a {type(value).__name__}; download it again")
    return value
