"""States of llama.cpp as sections of our snapshots, and as files on the way to another context.

llama.cpp writes and reads states tensor by tensor when it is given a file, and in one piece of memory otherwise: so it
is given a file, and a snapshot never needs a second copy of the cache in memory. Its reader trusts what it reads: it
gets bytes only after our checksums and the counts that we know ourselves were checked.

Sections: ``state`` (llama.cpp's own), ``positions`` int32 [T] in the order of the cells, and where queries were seen
``queries`` float32 [L, W, H, D] after RoPE with the scale of the logits behind it, and ``query-positions`` int32 [W].
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ....cache.snapshots import Snapshot
from ....cache.snapshots.state import total_tokens_of
from ....errors import SnapshotError, StorageError
from ....export.spec import ModelSpec

if TYPE_CHECKING:
    from .cache import LlamaCppCache
    from .library import LlamaContext

STATE, POSITIONS, QUERIES, ASKED = "state", "positions", "queries", "query-positions"
RAW = "raw"
PIECE_BYTES = 1 << 20
FIXED_BYTES = 1 << 16  # of what is saved beside the cells, at most
RECORD_BYTES = 64  # of a cell beside its keys and values, at most
HEADER_BYTES = 12  # of llama.cpp's file: magic number, version, tokens (we give it none)


@dataclass(frozen=True)
class Saved:
    """What a snapshot says beside llama.cpp's state. ``positions`` int32 [T] in the order of the cells."""

    total_tokens: int
    positions: NDArray[np.int32]
    queries: NDArray[np.float32] | None
    query_positions: NDArray[np.int32] | None
    scale: float


@dataclass(frozen=True)
class Layout:
    """What a state of this model has: ``kind`` is ggml's number of the storage, ``row_bytes`` those of a token's keys
    in one layer. ``in_order``: the cells' order must be that of the snapshot's positions, as scorers rely on it.
    """

    layers: int
    kind: int
    row_bytes: int
    in_order: bool


@contextlib.contextmanager
def temporary_path(folder: Path) -> Iterator[Path]:
    """A path for a file that is gone afterwards: in ``folder``, or where the system has its temporary files."""
    place = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    try:
        made = tempfile.TemporaryDirectory(prefix="satchel-state-", dir=place)
    except OSError as error:
        raise StorageError(f"{place} takes no temporary file ({error.strerror}); make room there") from None
    with made as name:
        yield Path(name) / "state"


def sections(cache: LlamaCppCache, context: LlamaContext, folder: Path) -> list[Any]:
    """(name, pieces, coding) of each section; the pieces are made as they are asked for."""
    positions, seen = cache.positions, cache.observed
    if seen is not None:
        positions = positions[np.argsort(seen.cells)]
    found: list[Any] = [
        (STATE, _state_pieces(cache, context, folder), RAW),
        (POSITIONS, [positions.astype("<i4")], RAW),
    ]
    if seen is not None and seen.queries is not None and seen.query_positions is not None:
        found.append((QUERIES, [np.append(seen.queries.ravel(), np.float32(seen.scale)).astype("<f4")], RAW))
        found.append((ASKED, [seen.query_positions.astype("<i4")], RAW))
    return found


def _state_pieces(cache: LlamaCppCache, context: LlamaContext, folder: Path) -> Iterator[bytes]:
    with temporary_path(folder) as path:
        if not context.save(path, cache.sequence):
            raise StorageError("llama.cpp could not write its state; make room on the disk of the cache folder")
        with path.open("rb") as file:
            if os.name == "posix":
                path.unlink()  # a process that is killed leaves nothing
            while piece := file.read(PIECE_BYTES):
                yield piece


def read(snapshot: Snapshot, spec: ModelSpec, cell_bytes: int) -> Saved:
    """What a snapshot holds beside the state, checked: nothing of it is used before.

    Raises:
        SnapshotError: it is damaged, or says what cannot be.
    """
    total, layers, heads, head_size = total_tokens_of(snapshot), spec.layers, spec.heads, spec.head_size
    positions = np.frombuffer(_section(snapshot, POSITIONS, 4 * total), "<i4").astype(np.int32)
    ordered = np.unique(positions)
    if len(ordered) != len(positions) or not len(ordered) or ordered[0] < 0 or ordered[-1] != total - 1:
        raise _unusable(snapshot, "its positions are not those of a text that was read")
    state = snapshot.find(STATE).original_bytes
    if not 0 < state <= len(positions) * (cell_bytes + RECORD_BYTES) + FIXED_BYTES:
        raise _unusable(snapshot, f"a state of {state} bytes is not that of {len(positions)} tokens")
    if QUERIES not in snapshot.sections:
        return Saved(total, positions, None, None, 0.0)
    asked = np.frombuffer(_section(snapshot, ASKED, 4 * total), "<i4").astype(np.int32)
    data = np.frombuffer(_section(snapshot, QUERIES, 1 << 30), "<f4").astype(np.float32)
    scale, queries = float(data[-1]) if len(data) else 0.0, data[:-1]
    if not len(asked) or queries.size != layers * len(asked) * heads * head_size or not np.isfinite(data).all():
        raise _unusable(snapshot, "its queries are not those of this model")
    return Saved(total, positions, queries.reshape(layers, len(asked), heads, head_size), asked, scale)


def load(
    snapshot: Snapshot, context: LlamaContext, sequence: int, saved: Saved, layout: Layout, folder: Path
) -> None:  # fmt: skip
    """Gives a state to llama.cpp, once its checksum is known to be right, and all numbers in it but keys and values.

    Raises:
        SnapshotError: it is damaged, or not the state of these positions.
    """
    with temporary_path(folder) as path:
        if not context.save(path, sequence):  # the state of no tokens: what every state begins with
            raise StorageError(f"{folder} takes no temporary file; make room there")
        empty, empty_bytes = path.read_bytes(), context.state_bytes(sequence)
        with path.open("wb") as file:
            for piece in snapshot.pieces(STATE):
                file.write(piece)
            size = file.tell()
        with path.open("rb") as file:
            if file.read(HEADER_BYTES) != empty[:HEADER_BYTES] or not _is_sound(file, size, saved, layout):
                raise _unusable(snapshot, "its state is not one of this model and these tokens")
        if not context.load(path, sequence):
            raise _unusable(snapshot, "llama.cpp does not take its state")
    last, grown = context.last_position(sequence), context.state_bytes(sequence) - empty_bytes
    if last != saved.total_tokens - 1 or grown != size - len(empty):
        raise _unusable(snapshot, "its state is not that of its tokens")


def _is_sound(file: BinaryIO, size: int, saved: Saved, layout: Layout) -> bool:
    """Whether what follows the header is what llama.cpp would have written for these positions.

    For each of its caches (windowed layers have one of their own, which holds their window): streams, cells; position,
    count of sequences and sequence of each cell; transposed, layers; type, bytes of a row and rows of each layer's
    keys, then of each layer's values.
    """
    layers, first = 0, True
    while file.tell() < size:
        streams, cells = _numbers(file, 2)
        records = _numbers(file, 3 * cells).reshape(-1, 3) if cells <= len(saved.positions) else np.empty((0, 3))
        if streams != 1 or len(records) != cells or (first and cells != len(saved.positions)):
            return False
        positions = records[:, 0]
        if first and layout.in_order and not np.array_equal(positions, saved.positions):
            return False
        if len(np.intersect1d(positions, saved.positions)) != cells or (records[:, 1] != 1).any():
            return False
        transposed, count = _numbers(file, 2)
        layers += int(count)
        if transposed or layers > layout.layers:
            return False
        for _ in range(2 * int(count)):
            kind, row, rest = _numbers(file, 3)
            if (kind, row, rest) != (layout.kind, layout.row_bytes, 0):
                return False
            file.seek(int(row) * int(cells), os.SEEK_CUR)
        first = False
    return file.tell() == size and layers == layout.layers


def _numbers(file: BinaryIO, count: int) -> NDArray[np.int64]:
    """uint32 from a file; zeros behind its end."""
    data = file.read(4 * int(count))
    return np.frombuffer(data.ljust(4 * int(count), b"\0"), "<u4").astype(np.int64)


def _section(snapshot: Snapshot, name: str, most_bytes: int) -> bytes:
    size = snapshot.find(name).original_bytes
    if size % 4 or size > most_bytes:
        raise _unusable(snapshot, f"its section {name} has {size} bytes")
    return bytes(snapshot.section(name))


def _unusable(snapshot: Snapshot, what: str) -> SnapshotError:
    return SnapshotError(
        f"the snapshot {snapshot.path} cannot be used: {what}; remove the file, and the document is read again"
    )
