"""GGUF models in several files, ``NAME-00001-of-00004.gguf`` and so on, as llama.cpp's splitter names them.

The first part has all metadata; each part has the tensors that it lists, and says which part it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ModelError

PART_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
COUNT, NUMBER, TENSORS = "split.count", "split.no", "split.tensors.count"


def split_count(metadata: Mapping[str, Any]) -> int:
    """How many files the model has; 1 for a whole one."""
    count = metadata.get(COUNT, 1)
    return max(count, 1) if isinstance(count, int) else 1


def other_parts(first: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """The paths of the second and further parts of the model whose first part has ``metadata``.

    Raises:
        ModelError: the file is not the first part, is not named as one, or another one is missing.
    """
    count = split_count(metadata)
    match = PART_NAME.fullmatch(first.name)
    if match is None or int(match[3]) != count:
        raise ModelError(
            f"{first} is one of {count} parts but is not named NAME-00001-of-{count:05}.gguf; give all parts their "
            "names back, or join them (llama-gguf-split --merge)"
        )
    paths = [first.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if int(match[2]) != 1 or metadata.get(NUMBER) != 0:
        raise ModelError(f"{first} is not the first of {count} parts; give the path of that: {paths[0]}")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{first} is one of {count} parts, and {shown} is missing; download the missing parts")
    return paths[1:]


def check_part(path: Path, metadata: Mapping[str, Any], number: int, count: int) -> None:
    """Refuses a part that is not the one its name says. ``number`` counts from 0."""
    found = (metadata.get(NUMBER), metadata.get(COUNT))
    if found != (number, count):
        raise ModelError(
            f"{path} says that it is part {found[0]!r:.20} of {found[1]!r:.20}, counted from 0, not part {number} of "
            f"{count}; download it again"
        )


def check_total(first: Path, metadata: Mapping[str, Any], tensors: int) -> None:
    """Refuses parts that have not the number of tensors, all together, that the first one says."""
    wanted = metadata.get(TENSORS, tensors)
    if wanted != tensors:
        raise ModelError(f"{first}: its parts have {tensors} tensors, it says {wanted!r:.20}; download them again")


def whole_name(first: Path) -> str:
    """The model's name: that of its first part without the number."""
    match = PART_NAME.fullmatch(first.name)
    return match[1] if match and match[1] else first.stem
