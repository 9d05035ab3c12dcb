"""``satchel export --format gguf``: the file, its settings, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from tiny_folders import write_tiny_folder

    path: Path = write_tiny_folder(tmp_path / "tiny-llama", config={"max_position_embeddings": 4096})
    return path


def test_a_file_answers_as_its_folder(satchel: Any, folder: Path, document: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = satchel("export", folder, out, "--kv", "window=512", "--kv", "budget_bytes=64MB")
    assert result.exit_code == 0
    assert result.stdout == f"{out}\n"
    assert "15 quantized" in result.stderr
    from satchel.export.sources import open_source

    with open_source(out) as source:
        found = {key: value for key, value in source.metadata.items() if key.startswith("satchel.kv.")}
    assert found == {"satchel.kv.window": 512, "satchel.kv.budget_bytes": 64_000_000}
    answer = satchel("ask", document, "How often?", "--model", out, "--max-new-tokens", 8)
    assert answer.exit_code == 0
    again = satchel("export", folder, out, "--format", "gguf", "--bits", 4)
    assert again.exit_code == 0, "an older .gguf is replaced"


# arguments -> (exit code, what is said)
REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no extension": (("out", "--format", "gguf"), 2, "does not end in .gguf; name the file out.gguf"),
    "an unknown setting": (("out.gguf", "--format", "gguf", "--kv", "x=1"), 2, "kv setting 'x' is not known"),
    "a bad value": (("out.gguf", "--format", "gguf", "--kv", "window=wide"), 2, "kv window='wide' is not a number"),
    "settings of a package": (("out", "--kv", "window=9"), 2, "--kv is for --format gguf"),
    "a package's flavour": (("out.gguf", "--flavour", "portable"), 2, "--flavour is for --format onnx"),
    "a flavour": (("out.gguf", "--format", "gguf", "--flavour", "native"), 2, "--flavour is for --format onnx"),
    "five bits": (("out.gguf", "--format", "gguf", "--bits", "5"), 2, "'5' is not one of '4', '8'"),
    "a letter": (("letter.gguf", "--format", "gguf"), 1, "exists and is not a GGUF file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(
    case: str, satchel: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, code, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letter.gguf").write_text("Dear aunt")
    before = sorted(tmp_path.iterdir())
    result = satchel("export", folder, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "letter.gguf").read_text() == "Dear aunt"
