"""What ``import satchel`` offers, name by name, and how little it loads."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import satchel
from satchel import errors

PUBLIC = [
    "Answer",
    "ClosedError",
    "Context",
    "ContextLengthError",
    "DocumentError",
    "DownloadError",
    "MemoryLimitError",
    "Model",
    "ModelError",
    "OptionError",
    "SatchelError",
    "SnapshotError",
    "StorageError",
    "Usage",
    "__version__",
    "load",
]
# Modules that cost seconds or hundreds of megabytes, or that only some commands need.
HEAVY = {"torch", "transformers", "llama_cpp", "pypdf", "docx", "bs4", "rich"}


def loaded_by(statement: str, folder: Path) -> set[str]:
    """Top-level modules in a fresh interpreter after ``statement``; ``folder`` holds nothing to import."""
    listing = "import json, sys; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    code = f"{statement}\n{listing}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_public_names_are_exactly_these() -> None:
    assert sorted(satchel.__all__) == sorted(PUBLIC)
    assert [name for name in PUBLIC if not hasattr(satchel, name)] == []


def test_every_error_is_public() -> None:
    ours = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert ours <= set(PUBLIC)


def test_public_things_are_documented() -> None:
    things = {name: getattr(satchel, name) for name in PUBLIC if name != "__version__"}
    assert [name for name, thing in things.items() if not inspect.getdoc(thing)] == []


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert satchel.__version__ == version("satchel")


def test_import_is_light(tmp_path: Path) -> None:
    assert loaded_by("import satchel", tmp_path) & HEAVY == set()


def test_the_light_check_notices(tmp_path: Path) -> None:
    assert "rich" in loaded_by("import rich.console", tmp_path) & HEAVY


@pytest.mark.parametrize("name", ["Model", "Context"])
def test_owned_things_are_context_managers(name: str) -> None:
    owned = getattr(satchel, name)
    assert callable(owned.close)
    assert callable(owned.__enter__)
    assert callable(owned.__exit__)
