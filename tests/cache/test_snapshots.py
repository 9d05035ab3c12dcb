"""Snapshot files: what is written comes back, byte for byte, and whatever else a file holds is refused in one line."""

from __future__ import annotations

import errno
import json
import mmap
import os
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from satchel.cache.snapshots import RANS_8, RANS_BF16, RAW, Snapshot, SnapshotWriter
from satchel.cache.snapshots.layout import ENTRY_BYTES, PREAMBLE_BYTES
from satchel.errors import ClosedError, SnapshotError, StorageError

PAGE = 4096


def bfloat16(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint16]]:
    values = np.random.default_rng(seed).normal(0, 1, count).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2")


NOISE = np.random.default_rng(1).bytes(10_000)
KEYS = bfloat16(30_000)


def write(path: Path, metadata: dict[str, Any] | None = None) -> Path:
    with SnapshotWriter(path, {"name": "test"} if metadata is None else metadata) as writer:
        writer.add("tokens", [b"abc", b"", b"defg"])
        writer.add("empty", [])
        writer.add("layer.0/keys", [KEYS[:100], KEYS[100:]], coding=RANS_BF16)
        writer.add("noise", [NOISE], coding=RANS_8)
        writer.add("digest-8", [np.full((3, 500), 7, np.int8)], coding=RANS_8)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "one.satchel")


# ---------------------------------------------------------------------------------------------------- round trip


def test_everything_comes_back(path: Path) -> None:
    expected = {"tokens": b"abcdefg", "empty": b"", "layer.0/keys": KEYS.tobytes(), "noise": NOISE,
                "digest-8": b"\7" * 1500}
    with Snapshot.open(path) as snapshot:
        assert snapshot.metadata == {"name": "test"}
        assert list(snapshot.sections) == list(expected)
        for name, data in expected.items():
            view = snapshot.section(name, expected_bytes=len(data))
            assert view == data
            assert view.readonly
            assert b"".join(snapshot.pieces(name)) == data
        codings = {name: section.coding for name, section in snapshot.sections.items()}
        assert codings == {"tokens": RAW, "empty": RAW, "layer.0/keys": RANS_BF16, "noise": RAW, "digest-8": RANS_8}
        snapshot.verify()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_raw_sections_lie_where_they_say(path: Path) -> None:
    with Snapshot.open(path) as snapshot:
        offset = snapshot.offset("noise")
        assert offset % PAGE == 0
        assert os.pread(snapshot.fileno(), len(NOISE), offset) == NOISE
        assert isinstance(snapshot.section("noise").obj, mmap.mmap)  # in place, not a copy
        with pytest.raises(SnapshotError, match="'layer.0/keys' should not be coded"):
            snapshot.offset("layer.0/keys")


def test_views_outlive_the_snapshot(path: Path) -> None:
    snapshot = Snapshot.open(path)
    view = snapshot.section("noise")
    snapshot.close()
    snapshot.close()
    path.unlink()
    assert view == NOISE
    with pytest.raises(ClosedError, match="is closed; open it again"):
        snapshot.section("tokens")


def test_the_bytes_are_as_specified(tmp_path: Path) -> None:
    """Built by hand from docs/snapshot-format.md, with nothing of the package's code."""
    with SnapshotWriter(tmp_path / "made", {"a": [1, "\u20ac"]}) as writer:
        writer.add("x", [b"hello"])
        writer.add("y", [b"\5" * 300], coding=RANS_8)
    block = struct.pack("<II", 300, 9) + struct.pack("<II", 2, 1) + b"\5"
    directory = b'{"a":[1,"\\u20ac"]}'
    metadata_bytes = len(directory)
    crc = zlib.crc32(b"hello")
    directory += struct.pack("<40sIIQQQII", b"x", 0, crc, 4096, 5, 5, crc, 0)
    directory += struct.pack("<40sIIQQQII", b"y", 1, zlib.crc32(block), 8192, 17, 300, zlib.crc32(b"\5" * 300), 0)
    head = b"\x89SATCHEL" + struct.pack("<IIQQIIIIIII", 1, 0, 12288 + len(directory), 12288, metadata_bytes, 2,
                                         zlib.crc32(directory), 0, 0, 0, 0)
    head += struct.pack("<I", zlib.crc32(head))
    expected = b"".join(part.ljust(PAGE, b"\0") for part in (head, b"hello", block)) + directory
    assert (tmp_path / "made").read_bytes() == expected


def test_memory_stays_small_however_large_the_snapshot(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 20)

    tracemalloc.start()
    with SnapshotWriter(tmp_path / "big", {}) as writer:
        writer.add("raw", pieces())
        writer.add("coded", pieces(), coding=RANS_BF16)
    with Snapshot.open(tmp_path / "big") as snapshot:
        snapshot.verify()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_pieces_do_not_change_the_file(tmp_path: Path, threads: int) -> None:
    data = np.concatenate([KEYS] * 40).tobytes()  # 2.4 MB: several blocks
    for name, size in (("a", 999_983), ("b", len(data))):
        with SnapshotWriter(tmp_path / name, {}, threads=threads if name == "b" else 1) as writer:
            writer.add("keys", (data[i : i + size] for i in range(0, len(data), size)), coding=RANS_BF16)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with Snapshot.open(tmp_path / "b", threads=threads) as snapshot:
        assert snapshot.sections["keys"].coding == RANS_BF16
        assert snapshot.section("keys") == data


def test_a_section_that_gets_noisy_after_its_first_block_is_still_right(tmp_path: Path) -> None:
    data = bytes(1 << 20) + NOISE * 150
    with SnapshotWriter(tmp_path / "x", {}) as writer:
        assert writer.add("x", [data], coding=RANS_8).coding == RANS_8
    with Snapshot.open(tmp_path / "x") as snapshot:
        assert snapshot.section("x") == data
        snapshot.verify()


# ------------------------------------------------------------------------------------------------ hostile files


class Hostile:
    """A small valid file that can be changed in ways that keep all its checksums right."""

    def __init__(self, **sections: bytes) -> None:
        self.metadata = b"{}"
        self.entries: list[list[Any]] = []
        self.body = b""
        for name, data in (sections or {"x": b"hello", "y": b"world"}).items():
            crc = zlib.crc32(data)
            self.entries.append([name.encode(), 0, crc, PAGE + len(self.body), len(data), len(data), crc, 0])
            self.body += data.ljust(-(-len(data) // PAGE) * PAGE, b"\0")
        self.head: dict[str, Any] = {}

    def bytes(self) -> bytes:
        directory = self.metadata + b"".join(struct.pack("<40sIIQQQII", *entry) for entry in self.entries)
        offset = PAGE + len(self.body)
        head = {"magic": b"\x89SATCHEL", "version": 1, "flags": 0, "length": offset + len(directory), "offset": offset,
                "metadata": len(self.metadata), "sections": len(self.entries), "crc": zlib.crc32(directory),
                "spare": 0, "spare1": 0, "spare2": 0, "spare3": 0} | self.head  # fmt: skip
        first = struct.pack("<8sIIQQIIIIIII", *head.values())
        first += struct.pack("<I", zlib.crc32(first))
        return first.ljust(PAGE, b"\0") + self.body + directory


def changed(index: int, field: int, value: object) -> Callable[[Hostile], None]:
    def change(hostile: Hostile) -> None:
        hostile.entries[index][field] = value

    return change


def header(**values: object) -> Callable[[Hostile], None]:
    def change(hostile: Hostile) -> None:
        hostile.head |= values

    return change


def metadata(text: bytes) -> Callable[[Hostile], None]:
    def change(hostile: Hostile) -> None:
        hostile.metadata = text

    return change


HUGE = 2**64 - 1
HOSTILE: dict[str, tuple[Callable[[Hostile], None], str]] = {
    "foreign": (header(magic=b"GGUF\0\0\0\0"), "it is no snapshot"),
    "newer": (header(version=2), "format version 2, this Satchel reads 1; update Satchel"),
    "older": (header(version=0), "format version 0"),
    "flags": (header(flags=1), "with flags 0x1"),
    "spare": (header(spare=1), "format version 1 with flags"),
    "reserved": (header(spare2=1), "format version 1 with flags"),
    "longer": (header(length=HUGE), "should have 18446744073709551615"),
    "directory too far": (header(offset=1 << 40), "directory is not at its end"),
    "directory unaligned": (header(offset=PAGE + 1), "directory is not at its end"),
    "directory at zero": (header(offset=0), "directory is not at its end"),
    "metadata too long": (header(metadata=0xFFFFFFFF), "claims 4294967295 bytes of metadata"),
    "too many sections": (header(sections=0xFFFFFFFF), "4294967295 sections"),
    "fewer sections": (header(sections=1), "directory is not at its end"),
    "directory checksum": (header(crc=1), "its directory was altered"),
    "no JSON": (metadata(b"{"), "not JSON"),
    "no UTF-8": (metadata(b'{"a":"\xff"}'), "not JSON"),
    "deep JSON": (metadata(b"[" * 100_000), "not JSON"),
    "long number": (metadata(b"1" * 100_000), "not JSON"),
    "no object": (metadata(b"[]"), "not a JSON object"),
    "name missing": (changed(0, 0, b""), "no proper name"),
    "name with a hole": (changed(0, 0, b"a\0b"), "no proper name"),
    "name with letters of others": (changed(0, 0, b"../X"), "no proper name"),
    "twice": (changed(1, 0, b"x"), "two sections 'x'"),
    "unknown coding": (changed(0, 1, 3), "'x' has the unknown coding 3"),
    "entry spare": (changed(0, 7, 1), "'x' has the unknown coding"),
    "overlap": (changed(1, 3, PAGE), "'y' lies in the wrong place"),
    "gap": (changed(1, 3, 3 * PAGE), "'y' lies in the wrong place"),
    "unaligned": (changed(1, 3, 2 * PAGE + 1), "'y' lies in the wrong place"),
    "offset beyond": (changed(1, 3, 1 << 60), "'y' lies in the wrong place"),
    "offset overflow": (changed(1, 3, HUGE), "'y' lies in the wrong place"),
    "lengths differ": (changed(0, 5, 6), "raw section 'x' has two lengths"),
    "checksums differ": (changed(0, 6, 6), "raw section 'x' has two lengths or checksums"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    hostile = Hostile()
    change(hostile)
    file = tmp_path / "hostile.satchel"
    file.write_bytes(hostile.bytes())
    with pytest.raises(SnapshotError, match=message) as caught:
        Snapshot.open(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.damaged == (name != "newer")


def test_the_hostile_files_are_good_without_their_change(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(Hostile().bytes())
    with Snapshot.open(tmp_path / "x") as snapshot:
        snapshot.verify()
        assert bytes(snapshot.section("y")) == b"world"


@pytest.mark.parametrize("length", [6, PAGE, HUGE, 1 << 62, (1 << 62) + 1])
def test_lengths_beyond_the_file(tmp_path: Path, length: int) -> None:
    hostile = Hostile()
    hostile.entries[1][4] = hostile.entries[1][5] = length
    (tmp_path / "x").write_bytes(hostile.bytes())
    if length == 6:  # still inside its page: the layout is valid, and the checksum finds it
        with Snapshot.open(tmp_path / "x") as snapshot, pytest.raises(SnapshotError, match="altered"):
            snapshot.section("y")
    elif length == PAGE:
        with Snapshot.open(tmp_path / "x") as snapshot, pytest.raises(SnapshotError, match="altered"):
            snapshot.verify()
    else:
        with pytest.raises(SnapshotError, match="wrong place|claims"):
            Snapshot.open(tmp_path / "x")


@pytest.mark.parametrize("original", [5 * 256 + 1, 1 << 40, HUGE])
def test_a_bomb_is_refused_before_anything_is_allocated(tmp_path: Path, original: int) -> None:
    hostile = Hostile()
    hostile.entries[1][1], hostile.entries[1][5] = 1, original
    (tmp_path / "x").write_bytes(hostile.bytes())
    with pytest.raises(SnapshotError, match=f"'y' claims {original} bytes from 5"):
        Snapshot.open(tmp_path / "x")


@pytest.mark.parametrize("coded", [b"", b"\1", struct.pack("<II", 1280, 0xFFFFFFFF), struct.pack("<II", 1280, 1000),
                                   struct.pack("<IIII", 1280, 9, 2, 1) + b"a" + b"more", bytes(17)])  # fmt: skip
def test_coded_sections_that_are_not_what_they_claim(tmp_path: Path, coded: bytes) -> None:
    hostile = Hostile(x=coded)
    hostile.entries[0][1] = 1
    hostile.entries[0][5] = min(1280, 256 * len(coded))
    (tmp_path / "x").write_bytes(hostile.bytes())
    with Snapshot.open(tmp_path / "x") as snapshot:
        for read in (lambda: snapshot.section("x"), lambda: list(snapshot.pieces("x")), snapshot.verify):
            if coded:
                with pytest.raises(SnapshotError, match="section 'x'"):
                    read()


def test_wrong_checksum_of_what_was_decoded(tmp_path: Path) -> None:
    hostile = Hostile(x=struct.pack("<IIII", 3, 9, 2, 1) + b"a")
    hostile.entries[0][1], hostile.entries[0][5] = 1, 3
    (tmp_path / "x").write_bytes(hostile.bytes())
    with Snapshot.open(tmp_path / "x") as snapshot:
        assert bytes(snapshot.section("x", verify=False)) == b"aaa"
        for read in (lambda: snapshot.section("x"), lambda: list(snapshot.pieces("x")), snapshot.verify):
            with pytest.raises(SnapshotError, match="'x' was altered"):
                read()


def test_every_byte_of_the_file_is_covered(tmp_path: Path) -> None:
    data = Hostile().bytes()
    for at in [*range(PREAMBLE_BYTES + 3), PAGE - 1, *range(PAGE, PAGE + 7), 2 * PAGE - 1, 2 * PAGE + 2,
               *range(3 * PAGE, len(data))]:  # fmt: skip
        mutant = bytearray(data)
        mutant[at] ^= 0x10
        (tmp_path / "x").write_bytes(mutant)
        with pytest.raises(SnapshotError), Snapshot.open(tmp_path / "x") as snapshot:
            snapshot.verify()
    assert len(data) == 3 * PAGE + 2 + 2 * ENTRY_BYTES


def test_cut_at_every_boundary(tmp_path: Path, path: Path) -> None:
    data = path.read_bytes()
    with Snapshot.open(path) as snapshot:
        ends = [edge for section in snapshot.sections.values() for edge in (section.offset, section.end)]
    cuts = {0, 1, 7, 8, 63, 64, PAGE - 1, PAGE, len(data) - ENTRY_BYTES, len(data) - 1}
    cuts |= {end + by for end in ends for by in (-1, 0, 1) if end + by < len(data)}
    for cut in sorted(cuts):
        (tmp_path / "x").write_bytes(data[:cut])
        with pytest.raises(SnapshotError, match="no snapshot|cut short|should have"):
            Snapshot.open(tmp_path / "x")
    (tmp_path / "x").write_bytes(data + b"\0")
    with pytest.raises(SnapshotError, match="should have"):
        Snapshot.open(tmp_path / "x")


def test_things_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("none", "No such file"), ("pipe", "is not a file"), (".", "is not a file")):
        with pytest.raises(SnapshotError, match=message) as caught:
            Snapshot.open(tmp_path / name)
        assert not caught.value.damaged


def test_missing_and_unexpected_sections(path: Path) -> None:
    with Snapshot.open(path) as snapshot:
        with pytest.raises(SnapshotError, match="has no section 'values'; remove the file"):
            snapshot.section("values")
        with pytest.raises(SnapshotError, match="'tokens' has 7 bytes, not 8"):
            snapshot.section("tokens", expected_bytes=8)


# ------------------------------------------------------------------------------------------- writing that fails


def test_beyond_the_limits_of_the_format(tmp_path: Path) -> None:
    def write_twice() -> None:
        with SnapshotWriter(tmp_path / "x", {}) as writer:
            writer.add("a", [])
            writer.add("a", [])

    def write_long() -> None:
        with SnapshotWriter(tmp_path / "x", {"long": "x" * (1 << 20)}):
            pass

    with pytest.raises(SnapshotError, match="cannot get a section 'a'"):
        write_twice()
    with pytest.raises(SnapshotError, match="the metadata has 10485.. bytes, more than 1048576"):
        write_long()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_pieces_leaves_the_older_file(path: Path, error: type[BaseException]) -> None:
    before = path.read_bytes()

    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise error

    with pytest.raises(error), SnapshotWriter(path, {}) as writer:
        writer.add("x", pieces())
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_full_disk_at_the_very_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space in"):
        write(path, {"new": 1})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from satchel.cache.snapshots import SnapshotWriter
from satchel.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with SnapshotWriter(Path(sys.argv[1]), {}) as writer:
        writer.add("x", (bytes(10_000) for _ in range(20)))
except StorageError as error:
    print(error)
"""


def test_full_while_writing(path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)  # POSIX only, as this test
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no space in")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_file_system(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], check=False,
                      capture_output=True).returncode:  # fmt: skip
        pytest.skip("needs the right to mount a small file system")
    try:
        older = write(folder / "older", {})
        with pytest.raises(StorageError, match="no space in .*small: .* free; make room"), \
                SnapshotWriter(folder / "new", {}) as writer:
            writer.add("x", (bytes(10_000) for _ in range(40)))
        assert [p.name for p in folder.iterdir()] == ["older"]
        with Snapshot.open(older) as snapshot:
            snapshot.verify()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_metadata_is_plain_ascii_json(tmp_path: Path) -> None:
    write(tmp_path / "x", {"name": "caf\u00e9 \udcff"})
    data = (tmp_path / "x").read_bytes()
    offset, length = struct.unpack_from("<QI", data, 24)
    assert json.loads(data[offset : offset + length]) == {"name": "caf\u00e9 \udcff"}
