"""Model sources: which kinds of file a model can come from, recognised by their first bytes, or as a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import ModelError
from .base import Source, SourceTensor, TokenizerFiles
from .folder import parse_record
from .gguf import MAGIC, open_gguf
from .huggingface import is_huggingface, open_huggingface

__all__ = ["Source", "SourceTensor", "TokenizerFiles", "is_huggingface", "open_gguf", "open_source", "parse_record"]

# first bytes of the file -> opener; a new kind of source is one row
OPENERS: dict[bytes, Callable[[Path], Source]] = {MAGIC: open_gguf}


def open_source(path: Path) -> Source:
    """Opens ``path`` with the source that recognises its first bytes; a folder as a Hugging Face model.

    Raises:
        ModelError: the file is missing, unreadable, damaged, or of no kind that is known.
    """
    if path.is_dir():
        return open_huggingface(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; give the path of a .gguf file or of a Hugging Face folder") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    for magic, opener in OPENERS.items():
        if head.startswith(magic):
            return opener(path)
    raise ModelError(
        f"{path} is not a GGUF file (it starts with {head[:4]!r}, not {MAGIC!r}); download it again"
    )
