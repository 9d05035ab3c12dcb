"""Kills a process again and again at random moments of saving a snapshot, and looks at what is left each time.

    python benchmarks/kill_while_saving.py --kills 200

After each kill, every snapshot that was reported as saved must be there, open, be whole and hold what was put in; a
document whose saving was killed must be absent or whole; at the end no temporary file may be left. Exits with 1 when
that is not so. What is saved is the KV cache of a tiny model, and the test restores it.
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
from functools import cache
from pathlib import Path

import numpy as np
from satchel.cache import ArchiveOptions, CacheSettings, CacheShape, KVCache
from satchel.cache.snapshots import Snapshot, SnapshotStore, Subject

FREQUENCIES = (10000.0 ** (-np.arange(64) / 64)).astype(np.float32)
SHAPE = CacheShape(layers=3, heads=8, kv_heads=4, head_size=128, scale=0.1)
SETTINGS = CacheSettings(sinks=16, window=128)
ARCHIVE = ArchiveOptions(codec="q8", retriever="landmark", sinks=16, window=128, recall_tokens=64, recall_every=8,
                         reach=0, warm_bytes=1 << 30)  # fmt: skip
SUBJECT = Subject("0123456789abcdef" * 4, "a model", {"any": "settings"}, ("document.txt",))
LIMIT_BYTES = 4_000_000_000
TOKENS = 600
DIFFERENT = 2  # caches


def tokens_of(number: int) -> range:
    """The tokens of the document ``number``; no two begin alike."""
    return range(1000 * number, 1000 * number + TOKENS)


@cache
def cache_of(number: int) -> KVCache:
    """What a tiny model remembers of a document of this number (of few: making one takes as long as saving it)."""
    made = KVCache(SHAPE, SETTINGS, hot_tokens=200, archive=ARCHIVE)
    rng = np.random.default_rng(number)
    for layer in range(SHAPE.layers):
        q, k, v = (rng.normal(size=(TOKENS, heads, SHAPE.head_size)).astype(np.float32) for heads in (8, 4, 4))
        # what the graph's operator does; the cache has no other way in
        made._native.attend(layer, q, k, v, np.arange(TOKENS), FREQUENCIES, scale=SHAPE.scale)
    made.commit(TOKENS)
    made.demote()
    return made


def check(snapshot: Snapshot, number: int) -> None:
    """Raises AssertionError or SnapshotError unless the snapshot holds the cache of this document, whole."""
    snapshot.verify()
    expected = cache_of(number % DIFFERENT)
    found = KVCache.restored(SHAPE, SETTINGS, snapshot, hot_tokens=200, archive=ARCHIVE)
    assert found.total_tokens == TOKENS
    for (name, mine, _), (_, theirs, _) in zip(found.sections(), expected.sections(), strict=True):
        assert b"".join(map(bytes, mine)) == b"".join(map(bytes, theirs)), f"section {name} of document {number}"
    found.close()


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
    for different in range(DIFFERENT):
        cache_of(different)
    while True:
        state = cache_of(number % DIFFERENT)
        print(f"begun {number}", flush=True)
        store.save(SUBJECT, tokens_of(number), state.sections(), bytes_needed=state.snapshot_bytes(),
                   extra=state.snapshot_extra())  # fmt: skip
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
