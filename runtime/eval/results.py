"""What was measured is not measured again: one file of JSON lines for each side and task, a line for each sample.

A file is named by the hash of everything that a result depends on, and its first line says what that is. A line that a
kill has cut off is ignored. Lines are appended whole, so two processes may work on the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import StorageError

FORMAT = 1  # of the samples and lines: a change of any generator is a new number


class Results:
    """The finished samples of one side and one task, by their labels."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Opens or will make the file for ``about`` in ``folder``. Raises StorageError when it cannot be read."""
        self.about = {"format": FORMAT, **about}
        text = json.dumps(self.about, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.file = folder / f"{self.key}.jsonl"
        self._lines = _read(self.file)

    def __contains__(self, label: str) -> bool:
        return label in self._lines

    def __getitem__(self, label: str) -> dict[str, Any]:
        return self._lines[label]

    def append(self, record: dict[str, Any]) -> None:
        """Keeps a finished sample; ``record["sample"]`` is its label. Raises StorageError, and keeps it in memory."""
        self._lines[record["sample"]] = record
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab+") as file:
                head = b"" if file.tell() else _line({"about": self.about})
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    head = b"" if file.read(1) == b"\n" else b"\n"
                file.write(head + _line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _full(self.file, error) from None

    def forget(self, labels: Iterable[str]) -> None:
        """Measures these samples anew: a later line counts."""
        for label in labels:
            self._lines.pop(label, None)

    def rows_file(self, label: str) -> Path:
        """Where the rows of log-probabilities of a sample lie, for sides that others are compared with."""
        return self.file.with_name(f"{self.key}-{label}.npy")


def write_rows(path: Path, rows: Iterable[NDArray[np.float32]], shape: tuple[int, int]) -> None:
    """Writes float32 ``rows`` of ``shape`` [positions, vocab] as they come; the file is there when it is whole.

    Raises:
        StorageError: the disk is full or must not be written.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for row in rows:
                file.write(row.astype("<f4").tobytes())
        unfinished.replace(path)
    except OSError as error:
        raise _full(path, error) from None
    finally:
        unfinished.unlink(missing_ok=True)


def read_rows(path: Path) -> NDArray[np.float32] | None:
    """The rows of `write_rows`, mapped; None when the file is missing or damaged."""
    try:
        rows: NDArray[np.float32] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return rows


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"{file} cannot be read ({error.strerror}); name another folder by --out") from None
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if isinstance(record, dict) and isinstance(record.get("sample"), str):
            found[record["sample"]] = record
    return found


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _full(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written ({error.strerror}); make room or name another folder by --out")
