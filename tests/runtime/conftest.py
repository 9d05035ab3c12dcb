"""Tiny seeded models for the runtime's tests, and ``tests/helpers`` and ``benchmarks`` on the path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import satchel
from satchel.runtime import Model

for folder in (Path(__file__).parents[1] / "helpers", Path(__file__).parents[2] / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_gguf(**options of write_tiny_gguf)``: the file of a tiny model, written once per set of options."""
    from tiny_models import write_tiny_gguf

    folder, made = tmp_path_factory.mktemp("tiny"), dict[str, Path]()

    def get(**options: Any) -> Path:
        name = repr(sorted(options.items()))
        if name not in made:
            made[name] = write_tiny_gguf(folder / f"tiny{len(made)}.gguf", **options)
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exported tiny models are kept for the session."""
    return tmp_path_factory.mktemp("packages")


@pytest.fixture
def load_tiny(tiny_gguf: Callable[..., Path], tiny_cache_dir: Path) -> Iterator[Callable[..., Model]]:
    """``load_tiny(gguf={...}, **arguments of satchel.load)``: closed after the test."""
    opened: list[Model] = []

    def load(gguf: dict[str, Any] | None = None, **arguments: Any) -> Model:
        path = tiny_gguf(**{"context_length": 4096, **(gguf or {})})
        options = {"threads": 2, "notice": lambda _: None, "cache_dir": tiny_cache_dir, **arguments}
        opened.append(satchel.load(path, **options))
        return opened[-1]

    yield load
    for model in opened:
        model.close()
