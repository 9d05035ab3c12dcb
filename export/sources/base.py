"""What every model source offers: metadata, and tensors that are read by ranges of rows.

Tensors are read with plain file reads into small buffers, never through a mapping of the whole file: an
export must not count the source in its resident memory, and a file cut short meanwhile must be an error, not
SIGBUS.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...devices.reporting import Progress
from ...errors import ModelError

HASH_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class SourceTensor(ABC):
    """One tensor of a source. ``shape`` is row-major: a weight matrix is [out, in].

    ``name`` is what its file calls it, for messages; ``Source.tensors`` has it under its GGUF name.
    """

    name: str
    type_name: str  # GGML's: "Q4_K", "F16", …
    shape: tuple[int, ...]
    size: int  # bytes
    path: Path

    @property
    def rows(self) -> int:
        """Product of all dimensions but the last; 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        return self.size // self.rows

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Raw bytes of rows start … stop−1 as uint8 [rows, row_bytes].

        Raises:
            ModelError: the file ends early or cannot be read.
        """

    def row_chunks(self, rows: int, first: int = 0, count: int | None = None) -> Iterator[tuple[int, int]]:
        """(start, stop) ranges of ``rows`` at a time that cover ``count`` rows from ``first`` on; None: the rest."""
        end = self.rows if count is None else first + count
        for start in range(first, end, rows):
            yield start, min(start + rows, end)


@dataclass(frozen=True)
class FileTensor(SourceTensor):
    """A tensor that lies in an open file as it is."""

    file: FileIO
    offset: int  # in the file, bytes

    def read_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        count = stop - start
        buffer = np.empty(count * self.row_bytes, dtype=np.uint8)
        self._fill(buffer.data, start * self.row_bytes)
        return buffer.reshape(count, self.row_bytes)

    def read_columns(self, first: int, into: npt.NDArray[Any]) -> None:
        """Columns of all rows from ``first`` on into [rows, n], of any type with as many bytes as an element here.

        Raises:
            ModelError: the file ends early or cannot be read.
        """
        view = into.reshape(-1).view(np.uint8).data
        step = len(view) // self.rows
        if step == self.row_bytes:  # whole rows are one piece
            self._fill(view, 0)
            return
        for row in range(self.rows):
            self._fill(view[row * step : (row + 1) * step], row * self.row_bytes + first * into.itemsize)

    def _fill(self, view: memoryview, at: int) -> None:
        try:
            self.file.seek(self.offset + at)
            done = 0
            while done < len(view):
                got = self.file.readinto(view[done:])
                if not got:
                    raise ModelError(f"{self.path} ends inside tensor {self.name}; download it again")
                done += got
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({error.strerror}) at tensor {self.name}") from None


@dataclass(frozen=True)
class TokenizerFiles:
    """A ready tokenizer that lies beside the weights, where the metadata has no vocabulary.

    ``path`` is its ``tokenizer.json``, which ``read`` reads; the records are the JSON files beside it, empty
    where there is none.
    """

    path: Path
    read: Callable[[], bytes]
    tokenizer_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    model_config: Mapping[str, Any]
    chat_template: str | None = None


class Source:
    """An open model: use as a context manager, or ``close()`` it.

    Whatever it was read from, ``metadata`` has GGUF's keys and ``tensors`` GGUF's names: an architecture is
    written once.

    Args:
        path: what the user named: a file or a folder.
        name: the model's name in lists and file names.
        paths: every file that the model is made of, in a fixed order.
        files: the ones among them that tensors are read from, open.
        interleaved_rope: query and key rows are in interleaved order, as llama.cpp permutes them for some
            families; never so in a Hugging Face folder.
        tokenizer: where it lies, if it is not in the metadata.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        paths: Sequence[Path],
        files: Sequence[FileIO],
        metadata: Mapping[str, Any],
        tensors: Mapping[str, SourceTensor],
        *,
        interleaved_rope: bool = False,
        tokenizer: TokenizerFiles | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.metadata = metadata
        self.tensors = tensors
        self.interleaved_rope = interleaved_rope
        self.tokenizer = tokenizer
        self.paths = tuple(paths)
        self._files = tuple(files)
        self._sha256: str | None = None

    @property
    def architecture(self) -> str:
        """The transformer family, for example ``qwen2``."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str) or not value:
            raise ModelError(
                f"{self.path} does not name its architecture (general.architecture); not a model file"
            )
        return value

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(status.st_size for _, status in self._statuses())

    @property
    def mark(self) -> list[int]:
        """Three numbers that change when a file is changed, replaced, added or removed, found without
        reading: size, time and inode of a single file; of several, the third is a digest of them all.
        """
        found = self._statuses()
        if len(found) == 1:
            status = found[0][1]
            return [status.st_size, status.st_mtime_ns, status.st_ino]
        each = [(path.name, status.st_size, status.st_mtime_ns, status.st_ino) for path, status in found]
        digest = int.from_bytes(hashlib.sha256(repr(each).encode()).digest()[:8], "big")
        return [sum(status[1] for status in each), max(status[2] for status in each), digest]

    @property
    def sha256(self) -> str:
        return self.hash()

    def hash(self, progress: Progress | None = None) -> str:
        """SHA-256 as hex digits, of the file, or of all files with their names and lengths; read once, then
        remembered.

        Raises:
            ModelError: a file is gone or cannot be read.
        """
        if self._sha256 is None:
            digest = hashlib.sha256()
            found = self._statuses()
            total, done = sum(status.st_size for _, status in found), 0
            buffer = bytearray(HASH_CHUNK_BYTES)
            view = memoryview(buffer)
            for path, status in found:
                if len(found) > 1:
                    digest.update(f"{path.name}\0{status.st_size}\0".encode())
                with _reading(path), path.open("rb", buffering=0) as file:
                    while got := file.readinto(buffer):
                        digest.update(view[:got])
                        done += got
                        if progress is not None:
                            progress("checking", done, total)
            self._sha256 = digest.hexdigest()
        return self._sha256

    def _statuses(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.paths:
            with _reading(path):
                found.append((path, path.stat()))
        return found

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{path} cannot be read any more ({error.strerror}); start again") from None
