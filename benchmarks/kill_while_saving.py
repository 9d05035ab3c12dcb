"""Kills a process again and again at random moments of saving a snapshot, and looks at what is left each time.

    python benchmarks/kill_while_saving.py --kills 200

After each kill, every snapshot that was reported as saved must be there, open, be whole and hold what was put in; a
document whose saving was killed must be absent or whole; at the end no temporary file may be left. Exits with 1 when
that is not so. `state_of` makes what is saved, and `check` compares it: point them at other states to test those.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from satchel.cache.snapshots import RANS_BF16, RAW, Snapshot, SnapshotStore, Subject

SUBJECT = Subject("0123456789abcdef" * 4, "a model", {"any": "settings"}, ("document.txt",))
LIMIT_BYTES = 4_000_000_000
MEBIBYTES = 12  # of each snapshot, a third of it coded


def tokens_of(number: int) -> range:
    """The tokens of the document ``number``; no two begin alike."""
    return range(1000 * number, 1000 * number + 600)


def state_of(number: int) -> list[tuple[str, Iterator[bytes], str]]:
    """What is saved for the document ``number``: (name, pieces, coding)."""
    return [
        ("keys", (_noise(number, piece) for piece in range(MEBIBYTES * 2 // 3)), RAW),
        ("values", (_floats(number, piece) for piece in range(MEBIBYTES // 3)), RANS_BF16),
    ]


def check(snapshot: Snapshot, number: int) -> None:
    """Raises AssertionError or SnapshotError unless the snapshot holds `state_of` this number."""
    snapshot.verify()
    for name, pieces, _ in state_of(number):
        for expected, found in zip(pieces, snapshot.pieces(name), strict=True):
            assert expected == found, f"section {name} of document {number}"


def _noise(number: int, piece: int) -> bytes:
    return np.random.default_rng((number, piece)).bytes(1 << 20)


def _floats(number: int, piece: int) -> bytes:
    values = np.random.default_rng((number, piece, 1)).standard_normal(1 << 19, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder otherwise)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        save_for_ever(arguments.folder, arguments.child)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(kill_all(Path(folder), arguments.kills, random.Random(arguments.seed))))


def save_for_ever(folder: Path, number: int) -> None:
    """Saves one document after the other, and says so."""
    store = SnapshotStore(folder, LIMIT_BYTES)
    while True:
        print(f"begun {number}", flush=True)
        store.save(SUBJECT, tokens_of(number), state_of(number), bytes_needed=MEBIBYTES << 20)
        print(f"saved {number}", flush=True)
        number += 1


def kill_all(folder: Path, kills: int, rng: random.Random) -> dict[str, float]:
    """Does it; returns counts. Raises AssertionError on the first thing that is wrong."""
    notices: list[str] = []
    store = SnapshotStore(folder, LIMIT_BYTES, notice=notices.append)
    number = whole = leftovers = 0
    seconds = 0.2
    for _ in range(kills):
        first = number
        lines, seconds = run_and_kill(folder, number, rng.uniform(0, 1.5 * seconds), seconds)
        saved = {int(line.split()[1]) for line in lines if line.startswith("saved")}
        begun = {int(line.split()[1]) for line in lines if line.startswith("begun")}
        leftovers += sum(1 for path in folder.rglob(".satchel-tmp-*") if path.is_file())
        for one in range(first, max(begun) + 1):
            match = store.find(SUBJECT.model_fingerprint, SUBJECT.settings_key, tokens_of(one))
            assert match is not None or one not in saved, f"document {one} was saved and is lost"
            if match is not None:
                with store.open(match.path) as snapshot:
                    check(snapshot, one)
                whole += 1
        number = max(begun) + 1
        entries = store.list()
        assert len(entries) == whole, "an older snapshot is lost"
        if whole > 20:  # the disk need not hold them all
            whole -= sum(1 for entry in entries[10:] if store.remove(entry.path))
    assert not notices, notices
    store.remove_leftovers()
    left = [path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".satchel"]
    assert not left, left
    return {"kills": kills, "documents": number, "temporary_files_left_by_kills": leftovers, "problems": 0}


def run_and_kill(folder: Path, number: int, delay: float, usual: float) -> tuple[list[str], float]:
    """(what the process said, seconds that a saving takes, as far as this run knows better than ``usual``)."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", str(number), "--folder", str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    begun = time.monotonic()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    lines += rest.splitlines()
    done = sum(line.startswith("saved") for line in lines)
    return lines, (time.monotonic() - begun) / done if done else max(usual, delay)


if __name__ == "__main__":
    main()
