"""Opens mutated files, as many as you like: whatever they hold, only a SatchelError may come out.

    python benchmarks/fuzz_files.py --count 1000000 --seed 1
    python benchmarks/fuzz_files.py --target snapshot --count 100000

Targets are the rows of TARGETS. Small valid files are mutated (bits, bytes, numbers, cuts, copies; JSON also by its
structure), half of the snapshots with their checksums made right again, so that the code behind the checksums is
reached as well. A mutant that raises something else or takes more than ten seconds is kept and named, and the exit code
is 1; so is a crash, by the process's end: run with --keep FILE to have the last mutant on the disk. With the native
library built under AddressSanitizer (SATCHEL_CXXFLAGS="-fsanitize=address -g1") run it as

    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)" \\
        ASAN_OPTIONS=detect_leaks=0 python benchmarks/fuzz_files.py --target snapshot --target entropy
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from satchel import kernels
from satchel.cache import ArchiveOptions
from satchel.cache.snapshots import RANS_8, RANS_BF16, Entry, Snapshot, SnapshotWriter
from satchel.errors import SatchelError

SLOWEST_SECONDS = 10
HELPERS = str(Path(__file__).resolve().parents[1] / "tests" / "helpers")
STATE_TOKENS, STATE_ARCHIVED = 300, 256
NUMBERS = (0, 1, 2, 127, 255, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (None, True, 0, -1, 1, 2**31, 2**63, 10**400, 1.5, 1e308, "", "x", "../x", "\ud800", "\0",
                           [], {}, [[]], {"": {}}, "9" * 50, "x" * 5000)  # fmt: skip

Mutate = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """``seeds``: valid files; ``mutate`` one of them; ``run`` opens the mutant and may raise SatchelErrors only."""

    seeds: list[bytes]
    mutate: Mutate
    run: Callable[[bytes], object]
    weight: int  # how many of the mutants in all are of this target


# --------------------------------------------------------------------------------------------------- mutations


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four small changes anywhere."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) or 1)
        kind = rng.randrange(8)
        if kind <= 1 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and out:
            out[at] = rng.randrange(256)
        elif kind <= 4:
            size = rng.choice((1, 2, 4, 8))
            at -= at % size
            number = rng.choice(NUMBERS) + rng.choice((0, 0, 1, -1))
            out[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == 5:
            del out[at : at + rng.choice((1, 8, 80, 4096, len(out)))]
        elif kind == 6:
            other, size = rng.randrange(len(out) or 1), rng.choice((1, 4, 8, 80, 4096))
            out[at : at + size] = out[other : other + size]
        else:
            out[at:at] = rng.randbytes(rng.choice((1, 8, 80)))
    return bytes(out)


def mutate_snapshot(rng: random.Random, data: bytes) -> bytes:
    """As `mutate_bytes`, but mostly where the file says something, and half of the time with right checksums."""
    if len(data) < 4096 or rng.random() < 0.2:
        return mutate_bytes(rng, data)
    offset, metadata_bytes = struct.unpack_from("<QI", data, 24)
    table = offset + metadata_bytes
    parts = {"head": (0, 64), "metadata": (offset, table), "table": (table, len(data)), "body": (4096, offset)}
    begin, end = parts[rng.choice(("head", "metadata", "table", "table", "body", "body"))]
    if (begin, end) == parts["metadata"] and rng.random() < 0.7:
        part = mutate_json(rng, data[begin:end])
    elif (begin, end) == parts["body"]:  # the beginnings of sections matter most
        begin += 4096 * rng.randrange((end - begin) // 4096)
        end = begin + rng.choice((8, 24, 64, 600))
        part = mutate_bytes(rng, data[begin:end])
        part = part if rng.random() < 0.1 else part[: end - begin].ljust(end - begin, b"\0")
    else:
        part = mutate_bytes(rng, data[begin:end])
        if rng.random() < 0.8:
            part = part[: end - begin].ljust(end - begin, b"\0")
    out = data[:begin] + part + data[end:]
    return repair(rng, out, metadata_bytes + len(part) - (end - begin) if begin == offset else metadata_bytes, offset)


def repair(rng: random.Random, data: bytes, metadata_bytes: int, offset: int) -> bytes:
    """Makes checksums and lengths right, or some of them."""
    if rng.random() < 0.3 or len(data) < offset:
        return data
    out = bytearray(data)
    if rng.random() < 0.8:
        struct.pack_into("<QQI", out, 16, len(out), offset, metadata_bytes & 0xFFFFFFFF)
    if rng.random() < 0.7:
        for at in range(offset + metadata_bytes, len(out) - 79, 80):
            begin, stored = struct.unpack_from("<QQ", out, at + 48)
            if begin + stored <= len(out):
                coding, crc = struct.unpack_from("<I", out, at + 40)[0], zlib.crc32(out[begin : begin + stored])
                struct.pack_into("<I", out, at + 44, crc)
                if not coding:
                    struct.pack_into("<I", out, at + 72, crc)
    struct.pack_into("<I", out, 40, zlib.crc32(out[offset:]))
    struct.pack_into("<I", out, 60, zlib.crc32(out[:60]))
    return bytes(out)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Values replaced, removed or copied; sometimes bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    try:
        value = json.loads(data)
    except ValueError:
        return mutate_bytes(rng, data)
    for _ in range(rng.randint(1, 3)):
        container = value
        while isinstance(container, (dict, list)) and container:
            key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
            below = container[key]
            if isinstance(below, (dict, list)) and below and rng.random() < 0.8:
                container = below
                continue
            if rng.random() < 0.15:
                del container[key]
            else:
                container[key] = copy.deepcopy(rng.choice(VALUES))
            break
    return json.dumps(value).encode()


# ----------------------------------------------------------------------------------------------------- targets


def snapshot_target(folder: Path) -> Target:
    """Snapshot.open, the entry in a list, every section in both ways, and verify."""
    file = folder / "mutant.satchel"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)

    def run(data: bytes) -> None:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
        with Snapshot.open(file) as snapshot:
            attempt(lambda: Entry.of(snapshot))
            for name in snapshot.sections:
                attempt(lambda name=name: snapshot.section(name))  # type: ignore[misc]
                attempt(lambda name=name: sum(map(len, snapshot.pieces(name))))  # type: ignore[misc]
            snapshot.verify()

    return Target([small_snapshot(folder / "seed", seed) for seed in range(8)], mutate_snapshot, run, weight=16)


def small_snapshot(path: Path, seed: int) -> bytes:
    """A valid snapshot of some 10 KB."""
    rng = np.random.default_rng(seed)
    floats = (rng.standard_normal(700, dtype=np.float32).view(np.uint32) >> 16).astype("<u2")
    metadata = {"satchel": "0.1.0", "created": 1, "model": {"fingerprint": "ab" * 32, "name": "m"}, "tokens": 20,
                "settings_key": "cd" * 32, "settings": {"sinks": 4}, "documents": ["a.txt"], "document_count": 1,
                "head": "", "extra": {}}  # fmt: skip
    with SnapshotWriter(path, metadata) as writer:
        writer.add("tokens", [np.arange(20, dtype=np.uint32)])
        if seed % 2:
            writer.add("keys", [floats], coding=RANS_BF16)
        if seed % 4 > 1:
            writer.add("codes", [rng.geometric(0.4, 1500).astype(np.uint8)], coding=RANS_8)
        if seed > 3:
            writer.add("digest", [bytes(900)], coding=RANS_8)
    data = path.read_bytes()
    path.unlink()
    return data


def entropy_target(_: Path) -> Target:
    """The native decoder alone. The first five bytes of a seed are its original length and planes."""
    rng = np.random.default_rng(1)
    seeds = []
    for planes, data in ((1, b"a"), (1, bytes(600)), (1, rng.geometric(0.3, 900).astype(np.uint8).tobytes()),
                         (2, rng.geometric(0.3, 901).astype(np.uint8).tobytes()), (2, rng.bytes(64))):  # fmt: skip
        seeds.append(struct.pack("<IB", len(data), planes) + kernels.entropy_encode(data, planes=planes))

    def run(data: bytes) -> None:
        if len(data) < 5:
            return
        length, planes = struct.unpack_from("<IB", data)
        try:
            kernels.entropy_decode(data[5:], length, planes=planes)
        except ValueError as error:  # what its callers expect
            raise SatchelError(str(error)) from None

    return Target(seeds, mutate_bytes, run, weight=12)


def package_target(folder: Path) -> Target:
    """satchel.json of a tiny package."""
    from satchel.export.package import MANIFEST_FILE, open_package

    package = tiny_package(folder)

    def run(data: bytes) -> None:
        (package / MANIFEST_FILE).write_bytes(data)
        open_package(package)

    return Target([(package / MANIFEST_FILE).read_bytes()], mutate_json, run, weight=2)


def state_target(folder: Path) -> Target:
    """A native KV cache from a layer's blob and payload, and its use. A seed is the blob's length (u32), the blob, the
    payload, and which of the kinds it is (u8).
    """
    kinds = [state_options(*names) for names in (
        (None, ""), ("q8", "landmark"), ("mikv", "minmax"), ("kvquant3", "channels"), ("grouped2", "centroid"),
        ("f16", "none"), ("q4", "centroid"))]  # fmt: skip
    kinds.append({**kinds[0], "windows": (40,)})
    descriptor = os.open(folder / "payload", os.O_RDWR | os.O_CREAT)
    seeds = [saved_state(options, kind) for kind, options in enumerate(kinds)]

    def run(data: bytes) -> None:
        if len(data) < 5:
            return
        length = struct.unpack_from("<I", data)[0]
        payload = data[4 + length : -1]
        os.pwrite(descriptor, payload, 0)
        os.ftruncate(descriptor, len(payload))
        options = dict(kinds[data[-1] % len(kinds)])
        if options["archive"] and data[-1] % 2:  # left in the file
            options["archive"] = {**options["archive"], "warm_limit_bytes": 0}
        try:
            cache = kernels.KVCache.restored(
                **options, tokens=STATE_TOKENS, blobs=[data[4 : 4 + length]], descriptor=descriptor, payload_offsets=[0]
            )
        except ValueError as error:
            raise SatchelError(str(error)) from None
        use_state(cache, *options.get("windows", ()))

    for seed in seeds:  # none of them is refused
        run(seed)
    return Target(seeds, mutate_state, run, weight=8)


def state_options(codec: str | None, retriever: str) -> dict[str, Any]:
    """Options of a native cache of one layer."""
    archive = None
    if codec:
        archive = ArchiveOptions(codec=codec, retriever=retriever, sinks=16, window=32, recall_tokens=64,
                                 recall_every=2, reach=250, warm_bytes=1 << 30)  # fmt: skip
    return {"layers": 1, "heads": 4, "kv_heads": 2, "head_size": 16, "observed_queries": 3,
            "archive": archive.native(16) if archive else None}  # fmt: skip


def saved_state(options: dict[str, Any], kind: int) -> bytes:
    """A seed: `STATE_TOKENS` tokens, `STATE_ARCHIVED` of them archived if there is an archive, and blocks chosen."""
    cache = kernels.KVCache(**options)
    window = options.get("windows", (0,))[0]
    attend_noise(cache, 0, STATE_TOKENS - 1, window)
    if options["archive"]:
        cache.archive(STATE_ARCHIVED)
        cache.drop_archived()
    attend_noise(cache, STATE_TOKENS - 1, 1, window)
    blob = cache.save_layer(0)
    payload = [cache.read_payload(0, head, 0, STATE_ARCHIVED // 64) for head in range(2)] if options["archive"] else []
    return struct.pack("<I", len(blob)) + blob + b"".join(payload) + bytes([kind])


def attend_noise(cache: kernels.KVCache, first: int, tokens: int, window: int = 0) -> None:
    """Reads ``tokens`` random pairs."""
    rng = np.random.default_rng(first)
    q, k, v = (rng.normal(size=(tokens, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    frequencies = (100.0 ** (-np.arange(8) / 8)).astype(np.float32)
    cache.attend(0, q, k, v, np.arange(first, first + tokens), frequencies, scale=0.5, window=window)
    cache.commit()


def use_state(cache: kernels.KVCache, window: int = 0) -> None:
    """All that a conversation does: steps, chunks, archiving, forgetting, saving."""
    for position in range(STATE_TOKENS, STATE_TOKENS + 3):
        attend_noise(cache, position, 1, window)
    cache.mark()
    attend_noise(cache, STATE_TOKENS + 3, 220, window)
    with np.errstate(all="ignore"):
        for head in range(2):
            cache.read(0, head, rotated=False)
    if cache.archived_until:
        cache.archive(cache.archived_until + 256)
        cache.drop_archived()
        attend_noise(cache, STATE_TOKENS + 223, 1)
    if window:
        attempt_to_forget(cache, STATE_TOKENS, window)
    attempt_to_forget(cache, 100, window)
    cache.save_layer(0)
    cache.close()


def attempt_to_forget(cache: kernels.KVCache, position: int, window: int) -> None:
    """Goes back and on from there, unless a layer with a window cannot."""
    try:
        cache.forget_from(position)
    except RuntimeError as error:
        if "cannot go back" not in str(error):
            raise
        return
    attend_noise(cache, position, 2, window)


def mutate_state(rng: random.Random, data: bytes) -> bytes:
    """Mostly the counts at the beginning and single numbers, in place; sometimes anything."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = 4 * (rng.randrange(1, 30) if rng.random() < 0.4 else rng.randrange(1, len(data) // 4))
        number = rng.choice((*NUMBERS, 0x7FC00000, 0xFF800000, 0x7F7FFFFF, rng.getrandbits(32), rng.randrange(300)))
        out[at : at + 4] = (number % (1 << 32)).to_bytes(4, "little")
    return bytes(out)


def tokenizer_target(folder: Path) -> Target:
    """tokenizer.json of a tiny package, as the runtime opens it."""
    from satchel.export.package import TOKENIZER_FILE, open_package
    from satchel.runtime.tokenizer import Tokenizer

    package = tiny_package(folder)
    settings = open_package(package).manifest.tokenizer

    def run(data: bytes) -> None:
        (package / TOKENIZER_FILE).write_bytes(data)
        Tokenizer.open(package, settings)

    return Target([(package / TOKENIZER_FILE).read_bytes()], mutate_json, run, weight=1)


def folder_target(folder: Path) -> Target:
    """A Hugging Face folder with one of its records changed, or the header of a shard. A seed is which (u8), and it."""
    sys.path.insert(0, HELPERS)
    from satchel.export.architectures import read_model
    from satchel.export.ready_tokenizer import ReadyTokenizer
    from satchel.export.sources import open_source
    from tiny_folders import write_tiny_folder

    model = write_tiny_folder(folder / "model", shards=2)
    whole = {path: path.read_bytes() for path in sorted(model.iterdir())}
    paths = list(whole)

    def header(data: bytes) -> bytes:
        return data[8 : 8 + int.from_bytes(data[:8], "little")]

    def run(data: bytes) -> None:
        path = paths[data[0]]
        record = data[1:]
        if path.suffix == ".safetensors":
            old = header(whole[path])
            record = len(record).to_bytes(8, "little") + record + whole[path][8 + len(old) :]
        path.write_bytes(record)
        try:
            with open_source(model) as source:
                attempt(lambda: read_model(source))
                tokenizer = source.tokenizer
                assert tokenizer is not None
                ReadyTokenizer(tokenizer, 300)
        finally:
            path.write_bytes(whole[path])

    seeds = [
        bytes([index]) + (header(whole[path]) if path.suffix == ".safetensors" else whole[path])
        for index, path in enumerate(paths)
    ]
    return Target(seeds, lambda rng, seed: seed[:1] + mutate_json(rng, seed[1:]), run, weight=1)


def tiny_package(folder: Path) -> Path:
    """The package of a tiny random model."""
    sys.path.insert(0, HELPERS)
    from satchel.export.exporter import export_model
    from tiny_models import write_tiny_gguf

    return export_model(write_tiny_gguf(folder / "tiny.gguf"), folder / "package").folder


TARGETS: dict[str, Callable[[Path], Target]] = {
    "snapshot": snapshot_target,
    "entropy": entropy_target,
    "state": state_target,
    "package": package_target,
    "tokenizer": tokenizer_target,
    "folder": folder_target,
}


# ----------------------------------------------------------------------------------------------------- running


def attempt(action: Callable[[], object]) -> None:
    """Goes on after a SatchelError: what is refused in one way must be harmless in the others, too."""
    with contextlib.suppress(SatchelError):
        action()


def fuzz(name: str, target: Target, count: int, seed: int, keep: Path | None) -> dict[str, Any]:
    """Runs ``count`` mutants; stops at the first that does what it must not."""
    rng = random.Random(f"{seed} {name}")
    refused = 0
    begun = time.process_time()  # of this process: what else the machine does is not our rate
    for index in range(count):
        data = target.mutate(rng, rng.choice(target.seeds))
        if keep:
            keep.write_bytes(data)
        if index % 16 == 0:
            signal.alarm(SLOWEST_SECONDS)
        try:
            target.run(data)
        except SatchelError:
            refused += 1
        except BaseException as error:
            signal.alarm(0)
            if isinstance(error, KeyboardInterrupt):
                raise
            failed = Path(tempfile.gettempdir()) / f"satchel-fuzz-{name}-{seed}-{index}"
            failed.write_bytes(data)
            return {"target": name, "count": index + 1, "failed": f"{type(error).__name__}: {error}"[:300],
                    "mutant": str(failed)}  # fmt: skip
    signal.alarm(0)
    seconds = time.process_time() - begun
    return {"target": name, "count": count, "refused": refused, "files_per_cpu_second": round(count / seconds)}


def too_slow(*_: object) -> None:
    raise TimeoutError(f"a mutant took more than {SLOWEST_SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="mutants of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only these")
    parser.add_argument("--keep", type=Path, help="write every mutant here first: the one that crashed stays")
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, too_slow)
    memory = Path("/dev/shm")
    failures = 0
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        chosen: dict[str, Target] = {}
        for name in arguments.target or TARGETS:
            (Path(folder) / name).mkdir()
            chosen[name] = TARGETS[name](Path(folder) / name)
        weights = sum(target.weight for target in chosen.values())
        for name, target in chosen.items():
            target.run(target.seeds[0])  # a valid file must open, or nothing is tested
            result = fuzz(name, target, -(-arguments.count * target.weight // weights), arguments.seed, arguments.keep)
            failures += "failed" in result
            print(json.dumps(result), flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
