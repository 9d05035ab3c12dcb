"""The house stands: which folder may import which, and nobody reads another's private names.

The table is the one of docs/architecture.md. The checker reads source text, so it needs no build; planted
violations show that it would notice.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder, or module at the root -> what it may import from the rest of the package. An entry opens a whole
# folder or one module of it; "" is the package's public face, for the command line alone.
FLOORS: dict[str, tuple[str, ...]] = {
    "cli": ("", "errors", "runtime", "export", "cache", "kernels", "devices"),
    "runtime": ("errors", "export", "cache", "kernels", "devices"),
    "export": ("errors", "kernels", "devices"),
    "cache": ("errors", "kernels", "devices"),
    "kernels": ("errors",),
    "devices": ("errors",),
    "errors": (),
    "__init__": ("errors", "runtime"),
    "__main__": ("cli",),
}
NOT_OURS = {"setup.py", "conftest.py"}  # modules at the root that are no part of the package


def modules(root: Path) -> Iterator[Path]:
    """Every module of the package below ``root``, relative to it."""
    yield from sorted(path.relative_to(root) for path in root.glob("*.py") if path.name not in NOT_OURS)
    for floor in FLOORS:
        yield from sorted(path.relative_to(root) for path in (root / floor).rglob("*.py"))


def violations(root: Path) -> list[str]:
    """One line per broken rule, ``file:line: what``."""
    return [f"{path}:{line}: {what}" for path in modules(root) for line, what in check(root, path)]


def check(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    home = path.parts[0].removesuffix(".py")
    if home not in FLOORS:
        yield 1, f"'{home}' has no row in the floors table"
        return
    tree = ast.parse((root / path).read_text(encoding="utf-8"), filename=str(path))
    folders = {name for name in FLOORS if (root / name).is_dir()}
    foreign: set[str] = set()  # local names of what comes from other packages of ours
    for node in ast.walk(tree):
        for name in absolute_names(node):
            if name.split(".")[0] == "satchel":
                yield getattr(node, "lineno", 1), f"absolute import of '{name}': inside, make it relative"
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        package = package_of(path, node)
        if package is None:
            yield node.lineno, "relative import leads out of the package"
            continue
        for alias in node.names:
            target = [*package, alias.name]
            if target[0] == home or (home == "__init__" and target[0] == "*"):
                continue
            foreign.add(alias.asname or alias.name)
            if not allowed(target, home, folders):
                yield node.lineno, f"'{home}' may not import '{'.'.join(target)}'"
            if private := [part for part in target if is_private(part)]:
                yield node.lineno, f"'{private[0]}' of '{'.'.join(target)}' is private to its package"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and root_name(node) in foreign:
            yield node.lineno, f"'{ast.unparse(node)}' reads a private name of another package"


def absolute_names(node: ast.AST) -> list[str]:
    """Modules that a node imports by full name, ``import_module("…")`` included."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module or ""]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).split(".")[-1]
        if called in {"import_module", "__import__"}:
            return [str(node.args[0].value)]
    return []


def package_of(path: Path, node: ast.ImportFrom) -> list[str] | None:
    """The dotted place that a relative import starts from, without ``satchel``; None above the root."""
    here = list(path.parts[:-1])
    if node.level - 1 > len(here):
        return None
    return here[: len(here) - (node.level - 1)] + (node.module.split(".") if node.module else [])


def allowed(target: list[str], home: str, folders: set[str]) -> bool:
    full = ".".join(target)
    if len(target) == 1 and target[0] not in folders | set(FLOORS):  # a name of the package's public face
        return "" in FLOORS[home]
    return any(entry and (full == entry or full.startswith(entry + ".")) for entry in FLOORS[home])


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def root_name(node: ast.Attribute) -> str | None:
    value: ast.expr = node
    while isinstance(value, ast.Attribute):
        value = value.value
    return value.id if isinstance(value, ast.Name) else None


def test_every_module_keeps_to_its_floor() -> None:
    assert len(list(modules(ROOT))) > 6
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("cache/x.py", "from ..runtime import load", "'cache' may not import 'runtime.load'"),
        ("cache/x.py", "from .. import runtime", "'cache' may not import 'runtime'"),
        ("cache/x.py", "def f():\n    from ..export import package", "may not import 'export.package'"),
        ("cache/scorers/x.py", "from ...cli import main", "'cache' may not import 'cli.main'"),
        ("kernels/x.py", "from ..devices.sizes import parse_size", "may not import 'devices.sizes.parse"),
        ("devices/x.py", "from ..kernels import reference", "may not import 'kernels.reference'"),
        ("cache/x.py", "from ..export.graph import build", "'cache' may not import 'export.graph.build'"),
        ("kernels/x.py", "from ..export.package import y", "may not import 'export.package.y'"),
        ("export/x.py", "from ..cache import KVCache", "'export' may not import 'cache.KVCache'"),
        ("runtime/x.py", "from .. import load", "'runtime' may not import 'load'"),
        ("runtime/x.py", "from .. import *", "'runtime' may not import '*'"),
        ("errors.py", "from .devices import sizes", "'errors' may not import 'devices.sizes'"),
        ("__init__.py", "from .cache import KVCache", "'__init__' may not import 'cache.KVCache'"),
        ("cli/x.py", "from ... import other", "leads out of the package"),
        ("runtime/x.py", "import satchel.cache", "absolute import of 'satchel.cache'"),
        ("runtime/x.py", "from satchel.cache import KVCache", "absolute import of 'satchel.cache'"),
        ("cli/x.py", "import satchel", "absolute import of 'satchel'"),
        ("cli/x.py", "import importlib\nimportlib.import_module('satchel.cli.ask')", "absolute import of"),
        ("cache/x.py", "from ..kernels import _native", "'_native' of 'kernels._native' is private"),
        ("cache/x.py", "from ..kernels._native import attend", "'_native' of 'kernels._native.attend' is"),
        ("cli/x.py", "from ..runtime.session import _step", "'_step' of 'runtime.session._step' is private"),
        ("cache/x.py", "from .. import kernels\nkernels.reference._twin()", "'kernels.reference._twin'"),
        ("cache/x.py", "from ..kernels import reference as r\nr._twin()", "'r._twin' reads a private name"),
        ("helpers.py", "x = 1", "'helpers' has no row in the floors table"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    house(tmp_path, path, source)
    found = violations(tmp_path)
    assert found
    assert all(line.startswith(path) for line in found)
    assert any(complaint in line for line in found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/x.py", "from . import _native\nfrom ._native import attend\n_native._private"),
        ("cache/scorers/x.py", "from .._shared import mean\nfrom ...errors import OptionError"),
        ("runtime/x.py", "from ..export import package\nfrom ..export.package import Manifest"),
        ("cli/x.py", "from .. import __version__, load\nfrom ..devices.sizes import parse_size"),
        ("__init__.py", "from .runtime import load\nfrom . import errors"),
        ("__main__.py", "from .cli import main"),
        ("devices/x.py", "import numpy\nfrom .. import errors\nimport satchelsomething"),
        ("setup.py", "import satchel"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    house(tmp_path, path, source)
    assert violations(tmp_path) == []


def house(root: Path, path: str, source: str) -> None:
    for floor in ("cli", "runtime", "export", "cache", "kernels", "devices"):
        (root / floor).mkdir()
    file = root / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(source, encoding="utf-8")
