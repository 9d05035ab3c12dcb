"""The flavour without weights: a package that only says where a .gguf file is, for the engine that runs such files.

It has the manifest and our tokenizer, and is made in the time that these take. The manifest remembers the file by its
path, size, time and inode: a file that is not the same any more is refused, never run by mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..devices.reporting import Progress
from ..errors import ModelError
from .architectures import DecoderModel
from .architectures.keys import OWN_PREFIX
from .package import Package
from .sources import Source, open_gguf
from .weights import MatrixRecord

KV_PREFIX = f"{OWN_PREFIX}kv."
MOST_SETTINGS, LONGEST_TEXT = 64, 200


class LinkedFlavour:
    """Writes nothing: the weights stay where they are."""

    def __init__(self, model: DecoderModel, source: Source, bits: int) -> None:
        del source, bits
        self.model = model

    bytes_needed = 0

    def write(self, folder: Path, progress: Progress) -> list[MatrixRecord]:
        del folder, progress
        return []


def link_to(source: Source) -> dict[str, Any]:
    """What the manifest remembers of the file."""
    return {"path": str(source.path.absolute()), "mark": source.mark}


def check_link(package: Package) -> Path:
    """The .gguf file of a package without weights.

    Raises:
        ModelError: it was moved, removed, or is not the one that the package was made of.
    """
    path, link = package.linked_file, package.manifest.link
    assert path is not None, "a package with weights"
    assert link is not None
    remedy = "give the path of the .gguf file"
    if not path.is_file():
        raise ModelError(f"{package.folder} was made of {path}, which is not there any more; {remedy}")
    with open_gguf(path) as source:
        if source.mark != link["mark"]:
            raise ModelError(f"{package.folder} was made of {path}, which was changed since; {remedy}")
    return path


def kv_settings(source: Source) -> dict[str, int | str]:
    """The settings of the KV cache that a file of ours brings (``satchel.kv.*``), not checked for their values."""
    metadata: Mapping[str, Any] = source.metadata
    keys = sorted(key for key in metadata if isinstance(key, str) and key.startswith(KV_PREFIX))[:MOST_SETTINGS]
    found = {key.removeprefix(KV_PREFIX)[:LONGEST_TEXT]: metadata[key] for key in keys}
    return {
        key: value if isinstance(value, int) else str(value)[:LONGEST_TEXT]
        for key, value in found.items()
        if isinstance(value, (int, str)) and not isinstance(value, bool)
    }
