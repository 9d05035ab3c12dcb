"""``satchel calibrate`` on a tiny model: figures, what ``models --verbose`` then shows, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("default")  # torch warns about itself


@pytest.fixture
def calibrate(satchel: Any, tiny: Path, document: Path) -> Any:
    """``calibrate(*arguments)``: the tiny model on the document, by small windows."""
    pytest.importorskip("torch", reason="needs the extra 'calibrate'")
    return lambda *arguments: satchel(
        "calibrate", tiny, "--text", document, "--window", "64", "--threads", "1", *arguments
    )


def test_json(calibrate: Any) -> None:
    found = calibrate("--json", "--seed", "2")
    assert found.exit_code == 0, found.output
    value = json.loads(found.stdout)
    assert (value["method"], value["window_tokens"], value["seed"], value["target"]) == ("kvzap", 64, 2, "repeat")
    assert value["tokens"] + value["held_out_tokens"] == value["text_tokens"] // 64 * 64
    assert len(value["text_sha256"]) == len(value["sha256"]) == 64
    assert (Path(value["package_folder"]) / "calibration" / "kvzap.safetensors").stat().st_size == value["bytes"]


def test_a_table_for_people(calibrate: Any) -> None:
    found = calibrate("--target", "later", "--tokens", "256")
    assert found.exit_code == 0, found.output
    assert "kvzap on 192 tokens, tested on 64 others" in found.stdout
    assert "R squared" in found.stdout
    assert found.stdout.endswith("use it by --policy kvzap\n")
    assert found.stderr == ""


@pytest.mark.parametrize(("method", "module"), [("locret", "retaining_head"), ("attention-gate", "gate_head")])
def test_trained_heads_in_a_table(method: str, module: str, calibrate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"satchel.export.calibration.{module}.EPOCHS", 1)
    found = calibrate("--method", method, "--tokens", "256")
    assert found.exit_code == 0, found.output
    assert f"{method} on 192 tokens, tested on 64 others" in found.stdout
    assert found.stdout.endswith(f"use it by --policy {method}\n")


@pytest.mark.parametrize("method", ["razor", "duo"])
def test_scores_of_heads(method: str, calibrate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("satchel.export.calibration.duo.STEPS", 2)
    found = calibrate("--method", method)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert f"{method} on " in lines[0]
    assert lines[1] == "scores by layer, one for each KV head:"
    assert [len(line.split()) for line in lines[2:-2]] == [3] * (len(lines) - 4)  # the layer, and its two heads
    assert lines[-1] == f"use it by --kv heads={method}"
    assert found.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--window", "4"), 2, "window is 4 tokens; give 16 to 65536"),
        (("--tokens", "100"), 2, "100 tokens are less than two windows of 64"),
        (("--tokens", "x"), 2, "'x' is not a number of tokens"),
        (("--window", "40000"), 1, "calibrating needs two windows of 40,000 or more"),
        (("--text", "nothing.txt"), 1, "nothing.txt"),
        (("--method", "magic"), 2, "'magic' is not"),
    ],
)
def test_refusals(calibrate: Any, arguments: tuple[str, ...], code: int, message: str) -> None:
    found = calibrate(*arguments)
    assert (found.exit_code, found.stdout) == (code, "")
    assert message in found.stderr


def test_stopped(calibrate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from satchel.export.calibration.decoder import Decoder

    whole = json.loads(calibrate("--seed", "9", "--json").stdout)
    run, left = Decoder.run, [2]

    def interrupted(self: Decoder, *given: Any, **named: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return run(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "run", interrupted)
        found = calibrate("--seed", "9", "--json")
    assert (found.exit_code, found.stdout) == (130, "")
    assert found.stderr == (
        "finished windows are kept; the same command goes on from there\nsatchel: stopped\n"
    )
    assert json.loads(calibrate("--seed", "9", "--json").stdout)["sha256"] == whole["sha256"]


def test_asking_with_and_without_a_calibration(
    calibrate: Any, satchel: Any, document: Path, tmp_path: Path
) -> None:  # fmt: skip
    order = ("ask", document, "What is cleaned?", "--policy", "kvzap", "--max-new-tokens", "3")
    assert calibrate().exit_code == 0
    assert satchel(*order).exit_code == 0
    found = satchel(*order, "--cache-dir", tmp_path)
    assert (found.exit_code, found.stdout) == (1, "")
    assert "has no calibration for kvzap; make it once: satchel calibrate MODEL --method kvzap" in found.stderr


def test_without_torch(satchel: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = satchel("calibrate", tiny)
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr == (
        'satchel: calibrating needs torch, which is not installed; pip install "satchel[calibrate]"\n'
    )


def test_help_has_examples(satchel: Any) -> None:
    shown = satchel("calibrate", "--help").stdout
    assert "Examples:" in shown
    assert "--policy kvzap" in shown


def test_models_verbose_says_what_a_package_has(
    calibrate: Any, satchel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = json.loads(calibrate("--json").stdout)
    folder = Path(value["package_folder"])
    monkeypatch.setattr("satchel.cli.models.exported_packages", lambda *_: [folder])
    row = json.loads(satchel("models", "--verbose", "--json").stdout)[0]
    assert row["packages"][0]["folder"] == str(folder)
    assert row["packages"][0]["calibrations"]["kvzap"]["r2"] == value["r2"]
    assert row["packages"][0]["calibrations"]["kvzap"]["problem"] is None
    shown = satchel("models", "--verbose").stdout
    assert f"kvzap: r2 {value['r2']}, tokens {value['tokens']}, window_tokens 64" in shown
    record = folder / "calibration" / "calibration.json"
    before = record.read_text(encoding="utf-8")
    record.write_text(before.replace(value["package"], "0" * 64), encoding="utf-8")
    assert "kvzap: of another package" in satchel("models", "--verbose").stdout
    record.write_text("{", encoding="utf-8")
    assert "is damaged (not JSON)" in satchel("models", "--verbose").stdout
    record.unlink()
    assert "not calibrated" in satchel("models", "--verbose").stdout
    monkeypatch.setattr("satchel.cli.models.exported_packages", lambda *_: [tmp_path])
    assert "is not a model package" in satchel("models", "--verbose").stdout
    monkeypatch.setattr("satchel.cli.models.exported_packages", lambda *_: [])
    assert "package yet" not in satchel("models", "--verbose").stdout
    monkeypatch.setattr("satchel.cli.models.is_verified", lambda *_: True)
    assert " has no package yet; it is exported on first use" in satchel("models", "--verbose").stdout
