"""GGUF models in several files: the same model as in one, and what is said of parts that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from satchel.errors import ModelError
from satchel.export.exporter import ensure_package, export_model
from satchel.export.gguf_writer import export_gguf
from satchel.export.sources import open_source
from tiny_models import write_tiny_gguf


def part_name(number: int, count: int) -> str:
    """As llama.cpp's splitter names them; ``number`` counts from 0."""
    return f"tiny-{number + 1:05}-of-{count:05}.gguf"


def split(whole: Path, folder: Path, count: int, change: Callable[[int, dict[str, Any]], object] | None = None) -> Path:
    """Writes the parts of ``whole``; ``change`` may alter the split keys of a part. Returns the first part."""
    folder.mkdir(exist_ok=True)
    reader = gguf.GGUFReader(whole)
    for number in range(count):
        writer = gguf.GGUFWriter(folder / part_name(number, count), "qwen2")
        keys = {"split.no": number, "split.count": count, "split.tensors.count": len(reader.tensors)}
        if change is not None:
            change(number, keys)
        for key, value in keys.items():
            writer.add_uint16(key, value)
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    kind = field.types[0]
                    inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / part_name(0, count)


def test_the_parts_are_the_whole(tmp_path: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "m.gguf")
    first = split(whole, tmp_path / "parts", 3)
    packages = [export_model(path, tmp_path / name) for path, name in ((whole, "a"), (first, "b"))]
    assert packages[0].data_file.read_bytes() == packages[1].data_file.read_bytes()
    assert packages[0].spec == packages[1].spec
    with open_source(first) as source:
        assert source.name == "tiny"
        assert [path.name for path in source.paths] == [part_name(number, 3) for number in range(3)]
        assert source.size == sum(path.stat().st_size for path in source.paths)
    assert packages[1].manifest.source_bytes == sum(path.stat().st_size for path in first.parent.iterdir())


def test_a_changed_part_makes_another_package(tmp_path: Path) -> None:
    first = split(write_tiny_gguf(tmp_path / "m.gguf"), tmp_path / "parts", 2)
    package = ensure_package(first, tmp_path / "cache")
    assert ensure_package(first, tmp_path / "cache").folder == package.folder
    split(write_tiny_gguf(tmp_path / "m.gguf", seed=1), tmp_path / "parts", 2)
    assert ensure_package(first, tmp_path / "cache").folder != package.folder


def rename_all(folder: Path) -> Path:
    for index, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"x{index}.gguf")
    return folder / "x0.gguf"


def remove(number: int) -> Callable[[Path], object]:
    return lambda folder: (folder / part_name(number, 3)).unlink()


def test_the_parts_become_one_file(tmp_path: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "m.gguf", types=("Q8_0",))
    first = split(whole, tmp_path / "parts", 3)
    for source in (whole, first):
        export_gguf(source, tmp_path / f"{source.stem}-out.gguf")
    with open_source(tmp_path / "m-out.gguf") as one, open_source(tmp_path / f"{first.stem}-out.gguf") as other:
        assert one.tensors.keys() == other.tensors.keys()
        for name, tensor in one.tensors.items():
            assert (tensor.read_rows(0, tensor.rows) == other.tensors[name].read_rows(0, tensor.rows)).all()
        assert set(one.metadata) == set(other.metadata)


def copy(source: int, target: int) -> Callable[[Path], object]:
    return lambda folder: (folder / part_name(target, 3)).write_bytes((folder / part_name(source, 3)).read_bytes())


def cut(number: int) -> Callable[[Path], object]:
    path = part_name(number, 3)
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:-100])


# what is done to the folder, perhaps with the path to open -> what the message says
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "not the first": (
        lambda folder: folder / part_name(1, 3), "not the first of 3 parts; give the path of that: .*-00001-",
    ),
    "part missing": (remove(1), r"one of 3 parts, and tiny-00002-of-00003\.gguf is missing"),
    "parts missing": (
        lambda folder: (remove(1)(folder), remove(2)(folder))[:0],
        r"tiny-00002-of-00003\.gguf, tiny-00003-of-00003\.gguf is missing",
    ),
    "names lost": (rename_all, "one of 3 parts but is not named NAME-00001-of-00003"),
    "part in the place of another": (copy(1, 2), "says that it is part 1 of 3, counted from 0, not part 2"),
    "the first in the place of another": (copy(0, 2), "says that it is part 0 of 3"),
    "another in the place of the first": (copy(1, 0), "not the first of 3 parts"),
    "part cut short": (cut(2), r"00003-of-00003\.gguf is not a valid GGUF file: tensor .*cut short"),
    "part that is a folder": (
        lambda folder: (remove(1)(folder), (folder / part_name(1, 3)).mkdir())[:0], "is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_parts_that_do_not_fit(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[case]
    first = split(write_tiny_gguf(tmp_path / "m.gguf"), tmp_path / "parts", 3)
    path = damage(first.parent)
    with pytest.raises(ModelError, match=message) as error:
        open_source(path if isinstance(path, Path) else first)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, keys: keys.update({"split.tensors.count": 7}), "its parts have 26 tensors, it says 7"),
        (lambda _, keys: keys.update({"split.no": 1}), "not the first of 3 parts"),
        (lambda _, keys: keys.update({"split.count": 4}), "one of 4 parts but is not named"),
        (lambda number, keys: number and keys.update({"split.count": 9}), "part 1 of 9"),
        (lambda number, keys: number and keys.pop("split.no"), "part None of 3"),
    ],
)
def test_keys_that_do_not_fit(change: Callable[[int, dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    first = split(write_tiny_gguf(tmp_path / "m.gguf"), tmp_path / "parts", 3, change)
    with pytest.raises(ModelError, match=message):
        open_source(first)


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "m.gguf")
    first = split(whole, tmp_path / "parts", 2)
    other = split(whole, tmp_path / "others", 1, lambda _, keys: keys.update({"split.no": 1, "split.count": 2}))
    other.rename(first.with_name(part_name(1, 2)))
    with pytest.raises(ModelError, match="has the tensor .*, as an earlier part has"):
        open_source(first)
