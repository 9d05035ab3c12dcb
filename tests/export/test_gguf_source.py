"""GGUF files: read as the ``gguf`` package reads them; hostile ones are refused quickly, in one line."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from satchel.errors import ModelError
from satchel.export.architectures import read_model
from satchel.export.sources import open_source
from satchel.export.sources.gguf import GgufMetadata
from tiny_models import write_tiny_gguf

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "t", extents: tuple[int, ...] = (32,), kind: int = F32, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(extents)}Q", len(extents), *extents)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: bytes = bytes(128),
) -> bytes:
    found = counts or (len(tensors), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, *found) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


HUGE = 0xFFFFFFFFFFFFFFFF
ARCHITECTURE = pair("general.architecture", STRING, text("qwen2"))
# case -> (bytes of the file, what the message says)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "only the magic": (b"GGUF", "it has 4 bytes"),
    "another magic": (b"PK\3\4" + bytes(100), "is not a GGUF file"),
    "version 1": (gguf_bytes(version=1), "GGUF version 1"),
    "version 99": (gguf_bytes(version=99), "GGUF version 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "absurd tensor count": (gguf_bytes(counts=(HUGE, 0)), "more than"),
    "absurd key count": (gguf_bytes(counts=(0, HUGE)), "more than"),
    "more keys than there are": (gguf_bytes((ARCHITECTURE,), counts=(0, 5)), "a metadata key has 0 bytes"),
    "absurd key length": (gguf_bytes((struct.pack("<Q", HUGE) + b"k",)), "a metadata key has"),
    "empty key": (gguf_bytes((pair("", UINT32, bytes(4)),)), "a metadata key has 0 bytes"),
    "key that is not text": (
        gguf_bytes((text(b"\xff\xfe") + struct.pack("<II", UINT32, 0),)),
        "not UTF-8",
    ),
    "key twice": (gguf_bytes((ARCHITECTURE, ARCHITECTURE)), "'general.architecture' appears twice"),
    "unknown value type": (gguf_bytes((pair("k", 77, bytes(4)),)), "unknown value type 77"),
    "nested array": (
        gguf_bytes((pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1)),)),
        "unknown value type 9",
    ),
    "absurd array": (gguf_bytes((pair("k", ARRAY, struct.pack("<IQ", UINT32, HUGE)),)), "claims"),
    "array over the end": (
        gguf_bytes((pair("k", ARRAY, struct.pack("<IQ", UINT64, 1 << 20)),)),
        "ends at byte",
    ),
    "absurd string": (gguf_bytes((pair("k", STRING, struct.pack("<Q", HUGE)),)), "ends at byte"),
    "absurd string in an array": (
        gguf_bytes((pair("k", ARRAY, struct.pack("<IQQ", STRING, 2, HUGE)),)),
        "ends at byte",
    ),
    "alignment zero": (gguf_bytes((pair("general.alignment", UINT32, bytes(4)),)), "alignment is 0"),
    "alignment 48": (
        gguf_bytes((pair("general.alignment", UINT32, struct.pack("<I", 48)),)),
        "alignment is 48",
    ),
    "alignment of text": (gguf_bytes((pair("general.alignment", STRING, text("x")),)), "alignment is 'x'"),
    "one part of several": (
        gguf_bytes((pair("split.count", UINT32, struct.pack("<I", 3)),)),
        "one of 3 parts but is not named NAME-00001-of-00003",
    ),
    "no dimensions": (gguf_bytes((), (tensor(extents=()),)), "0 dimensions"),
    "many dimensions": (gguf_bytes((), (tensor(extents=(1,) * 9),)), "9 dimensions"),
    "zero dimension": (gguf_bytes((), (tensor(extents=(32, 0)),)), "impossible shape"),
    "dimensions that overflow": (gguf_bytes((), (tensor(extents=(1 << 32, 1 << 32)),)), "impossible shape"),
    "absurd dimension": (gguf_bytes((), (tensor(extents=(HUGE,)),)), "impossible shape"),
    "unknown tensor type": (gguf_bytes((), (tensor(kind=200),)), "has the type 200"),
    "row that is no whole block": (gguf_bytes((), (tensor(extents=(33,), kind=Q8_0),)), "rows of 33"),
    "tensor twice": (gguf_bytes((), (tensor(), tensor())), "'t' appears twice"),
    "tensor without a name": (gguf_bytes((), (tensor(name=""),)), "a tensor name has 0 bytes"),
    "unaligned tensor": (gguf_bytes((), (tensor(offset=8),)), "no multiple of the alignment"),
    "tensor over the end": (gguf_bytes((), (tensor(offset=32),)), "cut short"),
    "absurd offset": (gguf_bytes((), (tensor(offset=HUGE - 31),)), "cut short"),
    "a large tensor in a small file": (gguf_bytes((), (tensor(extents=(1 << 40,)),)), "cut short"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=message) as error:
        open_source(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 200, 7), *range(200, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            open_source(path)


def test_flipped_header_bytes_never_crash(tmp_path: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "flipped.gguf"
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(0, 9000)] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            with open_source(path) as source:
                for key in source.metadata:
                    source.metadata[key]
                read_model(source)
        except ModelError:
            pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "does not exist"),
        (lambda path: path.mkdir(), "is a folder without config.json"),
    ],
    ids=["missing", "folder"],
)
def test_what_is_no_file(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    with pytest.raises(ModelError, match=message):
        open_source(path)


def test_everything_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    metadata = {
        "general.alignment": 64,
        ".a": 7,
        ".b": 0.5,
        ".c": True,
        ".d": "ä",
        ".e": [1, 2, 3],
        ".f": ["x", ""],
    }
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", metadata=metadata)
    theirs = gguf.GGUFReader(path)
    with open_source(path) as ours:
        assert ours.architecture == "llama"
        for key, field in theirs.fields.items():
            if not key.startswith("GGUF."):
                assert ours.metadata[key] == field.contents(), key
        assert len(ours.metadata) == len([key for key in theirs.fields if not key.startswith("GGUF.")])
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for expected in theirs.tensors:
            found = ours.tensors[expected.name]
            assert found.shape == tuple(int(extent) for extent in expected.shape[::-1])
            assert found.type_name == expected.tensor_type.name
            raw = found.read_rows(0, found.rows)
            assert raw.tobytes() == expected.data.tobytes()
            if found.rows > 2:
                np.testing.assert_array_equal(found.read_rows(1, 3), raw[1:3])


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    with open_source(path) as source:
        last = max(source.tensors.values(), key=lambda tensor: tensor.offset)
        with path.open("rb+") as file:
            file.truncate(last.offset + 1)
        with pytest.raises(ModelError, match=f"ends inside tensor {last.name}"):
            last.read_rows(0, last.rows)


def test_text_that_is_not_utf8_does_not_stop_reading(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes((pair("general.name", STRING, text(b"a\xff")),)))
    with open_source(path) as source:
        assert source.metadata["general.name"] == "a�"


@pytest.mark.real
def test_a_real_vocabulary(real_model: Callable[[str], Path]) -> None:
    with open_source(real_model("qwen2.5-coder-0.5b-instruct")) as source:
        tokens = source.metadata["tokenizer.ggml.tokens"]
        assert len(tokens) == 151936
        assert (tokens[0], tokens[151645]) == ("!", "<|im_end|>")


def test_values_with_their_types_and_arrays_of_nothing(tmp_path: Path) -> None:
    nothing = struct.pack("<IQ", STRING, 0)
    pairs = (ARCHITECTURE, pair("k.none", ARRAY, nothing), pair("k.text", STRING, text(b"a\xff")))
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(pairs))
    with open_source(path) as source:
        metadata = source.metadata
        assert isinstance(metadata, GgufMetadata)
        assert metadata["k.none"] == []
        assert metadata.exact("k.none") == (STRING, True, [])
        assert metadata["k.text"] == "a\ufffd"
        assert metadata.exact("k.text") == (STRING, False, b"a\xff")
