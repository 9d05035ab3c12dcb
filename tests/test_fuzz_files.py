"""A short run of benchmarks/fuzz_files.py, and proof that it would notice."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz_files.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("satchel_fuzz_files", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_some_thousand_mutants(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--count", "6000", "--seed", "3"], cwd=tmp_path, check=False,
                          capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["target"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(rows) == {"snapshot", "entropy", "state", "package", "tokenizer", "folder"}
    assert all(0.4 < row["refused"] / row["count"] < 1 for row in rows.values())


def test_mutants_reach_what_lies_behind_the_checksums(script: ModuleType, tmp_path: Path) -> None:
    target = script.snapshot_target(tmp_path)
    rng, messages = random.Random(1), set()
    for _ in range(1500):
        try:
            target.run(target.mutate(rng, rng.choice(target.seeds)))
        except script.SatchelError as error:
            messages.add(str(error).partition("cannot be used: ")[2])
    for part in ("claims", "wrong place", "unknown coding", "no proper name", "not JSON", "coded data is damaged",
                 "was altered", "should have", "not at its end"):  # fmt: skip
        assert [message for message in messages if part in message], part


@pytest.mark.parametrize("error", [ValueError("oops"), MemoryError(), SystemExit(3), TimeoutError("slow")])
def test_the_fuzzer_notices(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    monkeypatch.setattr(script.tempfile, "gettempdir", lambda: str(tmp_path))

    def run(data: bytes) -> None:
        if data != b"seed":
            raise error

    target = script.Target([b"seed"], script.mutate_bytes, run, 1)
    result = script.fuzz("planted", target, 100, 1, None)
    assert result["failed"].startswith(type(error).__name__)
    assert Path(result["mutant"]).exists()
