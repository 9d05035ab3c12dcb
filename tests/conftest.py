"""Fixtures for tests marked ``real``; see ``real_files.py`` for where the files come from.

And how many tests run at once: as many as there are cores when all plain tests do. What somebody names runs alone, and
so do real models, which take a gigabyte and all cores each.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# A shell starts what runs in its background with Ctrl-C ignored, and programs inherit that: the tests that press it
# would be about that shell.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


MOST_WORKERS = 8  # each of them takes up to a gigabyte


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For ``-n auto``, which ``pyproject.toml`` says."""
    all_plain = config.args_source == config.ArgsSource.TESTPATHS and "not real" in config.option.markexpr
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if all_plain else 0


def _load_real_files() -> ModuleType:
    """``tests`` is no package and not on the path (import mode importlib): it is loaded by its file."""
    name = "satchel_tests_real_files"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("real_files.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """``real_model(name)``: the path of a registry model's .gguf. One that cannot be had fails the test."""
    get: Callable[[str], Path] = _load_real_files().real_model
    return get


@pytest.fixture(scope="session")
def real_document() -> Callable[[str], Path]:
    """``real_document(name)``: policy.txt, policy.html (a folder), policy.pdf, policy.epub or bible.txt."""
    get: Callable[[str], Path] = _load_real_files().real_document
    return get
