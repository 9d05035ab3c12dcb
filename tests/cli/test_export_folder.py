"""``satchel export`` and ``ask`` with a Hugging Face folder: the same answers from the folder and its package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from tiny_folders import write_tiny_folder

    path: Path = write_tiny_folder(tmp_path / "tiny-llama", shards=2, config={"max_position_embeddings": 4096})
    return path


def test_a_folder_and_its_package_answer_alike(satchel: Any, folder: Path, document: Path, tmp_path: Path) -> None:
    out = tmp_path / "package"
    exported = satchel("export", folder, out)
    assert exported.exit_code == 0
    assert exported.stdout == f"{out}\n"
    assert "largest error of a matrix" in exported.stderr
    options = ("--max-new-tokens", 8, "--seed", 3, "--temperature", 2)
    answers = [satchel("ask", document, "How often?", "--model", model, *options) for model in (folder, out)]
    assert [answer.exit_code for answer in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout != "\n"


def test_a_folder_that_is_no_model(satchel: Any, folder: Path, document: Path, tmp_path: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    for arguments in (("export", folder, tmp_path / "out"), ("ask", document, "How?", "--model", folder)):
        result = satchel(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"satchel: {folder} lacks 'model-00002-of-00002.safetensors'")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
