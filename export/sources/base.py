"""What every model source offers: metadata, and tensors that are read by ranges of rows.

Tensors are read with plain file reads into small buffers, never through a mapping of the whole file: an
export must not count the source in its resident memory, and a file cut short meanwhile must be an error, not
SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...devices.reporting import Progress
from ...errors import ModelError

HASH_CHUNK_BYTES = 4 << 20
INTERLEAVED_FAMILIES = ("llama", "granite", "smollm3")  # in GGUF files


@dataclass(frozen=True)
class SourceTensor:
    """One tensor in the source file. ``shape`` is row-major: a weight matrix is [out, in]."""

    name: str
    type_name: str  # "Q4_K", "F16", …
    shape: tuple[int, ...]
    offset: int  # in the file, bytes
    size: int  # bytes
    file: FileIO
    path: Path

    @property
    def rows(self) -> int:
        """Product of all dimensions but the last; 1 for a vector."""
        count = 1
        for extent in self.shape[:-1]:
            count *= extent
        return count

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        return self.size // self.rows

    def read_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Raw bytes of rows start … stop−1 as uint8 [rows, row_bytes].

        Raises:
            ModelError: the file ends early or cannot be read.
        """
        count = stop - start
        buffer = np.empty(count * self.row_bytes, dtype=np.uint8)
        view = buffer.data
        try:
            self.file.seek(self.offset + start * self.row_bytes)
            done = 0
            while done < len(view):
                got = self.file.readinto(view[done:])
                if not got:
                    raise ModelError(f"{self.path} ends inside tensor {self.name}; download it again")
                done += got
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({error.strerror}) at tensor {self.name}") from None
        return buffer.reshape(count, self.row_bytes)

    def row_chunks(self, rows: int) -> Iterator[tuple[int, int]]:
        """(start, stop) ranges that cover all rows, ``rows`` at a time."""
        for start in range(0, self.rows, rows):
            yield start, min(start + rows, self.rows)


class Source:
    """An open model file: use as a context manager, or ``close()`` it."""

    def __init__(
        self, path: Path, file: FileIO, metadata: Mapping[str, Any], tensors: Mapping[str, SourceTensor]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._file = file
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
    def interleaved_rope(self) -> bool:
        """Whether the rows of queries and keys are in interleaved order, dimension 2i beside its partner, and must
        be put back: llama.cpp permutes them so in the families whose original code has them half-split.
        """
        return self.architecture in INTERLEAVED_FAMILIES

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def sha256(self) -> str:
        return self.hash()

    def hash(self, progress: Progress | None = None) -> str:
        """SHA-256 of the whole file as hex digits; read once, then remembered."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            total, done = self.size, 0
            buffer = bytearray(HASH_CHUNK_BYTES)
            view = memoryview(buffer)
            with self.path.open("rb", buffering=0) as file:
                while got := file.readinto(buffer):
                    digest.update(view[:got])
                    done += got
                    if progress is not None:
                        progress("checking", done, total)
            self._sha256 = digest.hexdigest()
        return self._sha256

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
