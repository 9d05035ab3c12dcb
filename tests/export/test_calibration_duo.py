"""DuoAttention's gates: what they do to a layer, their gradient, planted passkeys, and a run that can be stopped."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from satchel.errors import ModelError, OptionError
from satchel.export.calibration.files import open_calibration, read_records
from satchel.export.calibration.head_scores import SCORES
from satchel.export.exporter import export_model
from satchel.export.package import Package
from satchel.runtime.calibrate import text_of
from satchel.runtime.tokenizer import Tokenizer
from tiny_models import write_tiny_gguf

torch = pytest.importorskip("torch", reason="needs the extra 'calibrate'")
from satchel.export.calibration import decoder as decoder_module  # noqa: E402
from satchel.export.calibration import duo  # noqa: E402
from satchel.export.calibration.decoder import Decoder, Gates  # noqa: E402
from satchel.export.calibration.duo import Exercise, Student, calibrate_duo, make_exercise  # noqa: E402
from satchel.export.calibration.text import Order, Passkeys, Text, cut_windows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch warns about itself
RNG = np.random.default_rng(1)
PASSKEYS = Passkeys(
    cues=((250, 241), (250, 242), (250, 243)), words=tuple((word, word + 1) for word in range(200, 240, 2)), end=(251,),
    question=(252, 253),
)  # fmt: skip
TEXT = Text(tuple(int(index) for index in RNG.integers(10, 199, 330)), before=(7, 8, 9), passkeys=PASSKEYS)
ORDER = Order(window_tokens=40)


def exercise_of(window_tokens: int = 40) -> Exercise:
    window = cut_windows(TEXT, Order(window_tokens=window_tokens, target="later"))[0]
    return make_exercise(window, PASSKEYS, (0, 0))


def made(tmp_path: Path, architecture: str) -> Package:
    return export_model(write_tiny_gguf(tmp_path / "tiny.gguf", architecture), tmp_path / "package")


# --- gates in a layer


def test_an_open_gate_changes_nothing_and_a_closed_one_is_a_window(package: Package) -> None:
    decoder, kv_heads = Decoder(package), package.spec.kv_heads
    before = decoder.embedded(TEXT.ids[:70])
    whole = decoder.layer(before, 0)
    torch.testing.assert_close(decoder.layer(before, 0, gates=Gates(torch.ones(kv_heads), 2, 9)), whole)
    streaming = decoder.layer(before, 0, gates=Gates(torch.zeros(kv_heads), 0, 9))
    decoder.spec = replace(package.spec, attention_windows=(9,) * package.spec.layers)
    torch.testing.assert_close(streaming, decoder.layer(before, 0))
    assert not torch.allclose(streaming, whole, atol=1e-2)


def test_a_streaming_head_sees_sinks_and_window(package: Package) -> None:
    decoder, gates = Decoder(package), Gates(torch.zeros(package.spec.kv_heads), 3, 10)
    before = decoder.embedded(TEXT.ids[:50])
    after = decoder.layer(before, 0, gates=gates)[-1]
    seen = []
    for token in range(50):
        other = before.clone()
        other[token] *= -1
        if not torch.equal(decoder.layer(other, 0, gates=gates)[-1], after):
            seen.append(token)
    assert seen == [0, 1, 2, *range(40, 50)]


def test_blocks_of_queries_change_nothing(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, gates = Decoder(package), Gates(torch.tensor([0.3, 0.6]), 3, 10)
    before = decoder.embedded(TEXT.ids[:50])
    whole = decoder.layer(before, 0, gates=gates)
    monkeypatch.setattr(decoder_module, "ROW_BLOCK", 7)
    torch.testing.assert_close(decoder.layer(before, 0, gates=gates), whole)


def test_a_gate_mixes_what_both_sides_see(package: Package) -> None:
    """Before the output projection, of the queries of its own KV head."""
    decoder, spec = Decoder(package), package.spec
    x = decoder.embedded(TEXT.ids[:50])

    def attention(first: float, second: float) -> Any:
        gates = Gates(torch.tensor([first, second]), 3, 10)
        return decoder._attention(x, 0, decoder_module._Nobody(), gates).view(50, spec.kv_heads, -1)

    full, streaming, mixed = attention(1, 1), attention(0, 0), attention(0.3, 0)
    torch.testing.assert_close(mixed[:, 0], 0.3 * full[:, 0] + 0.7 * streaming[:, 0])
    torch.testing.assert_close(mixed[:, 1], streaming[:, 1])


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gemma3", "olmo2"])
def test_the_gradient_is_that_of_differences(architecture: str, tmp_path: Path) -> None:
    package = made(tmp_path, architecture)
    student, exercise = Student(Decoder(package), 2, 10), exercise_of()
    windows = package.spec.attention_windows
    gates = RNG.uniform(0.2, 0.8, (package.spec.layers, package.spec.kv_heads))
    distance, gradient = student.gradient(exercise, gates)
    assert distance == pytest.approx(student.distance(exercise, gates), rel=1e-5)
    for layer, head in np.ndindex(gates.shape):
        step = np.zeros_like(gates)
        step[layer, head] = 0.02
        change = (student.distance(exercise, gates + step) - student.distance(exercise, gates - step)) / 0.04
        assert change == pytest.approx(gradient[layer, head], rel=0.02, abs=1e-4 * np.abs(gradient).max())
        if windows[layer]:
            assert gradient[layer, head] == 0


def test_full_attention_is_no_distance_away(package: Package) -> None:
    student, exercise = Student(Decoder(package), 2, 10), exercise_of()
    gates = np.ones((package.spec.layers, package.spec.kv_heads))
    distance, gradient = student.gradient(exercise, gates)
    assert 0 <= distance < 1e-9
    assert np.abs(gradient).max() < 1e-4
    assert student.distance(exercise, 0 * gates) > 0.01


# --- passkeys


@pytest.mark.parametrize("window_tokens", [20, 40, 160])
def test_passkeys_are_hidden_from_streaming_heads(window_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duo, "PASSKEY_EVERY", 50)
    text = replace(TEXT, ids=TEXT.ids * 2)
    window = cut_windows(text, Order(window_tokens=window_tokens, target="later"))[0]
    exercise = make_exercise(window, PASSKEYS, (0, 0))
    ids, count = exercise.ids, max(1, min(3, window_tokens // 50))
    asked = ids.index(252)
    assert ids[asked : asked + 2] == PASSKEYS.question
    cues = [index for index, token in enumerate(ids) if token == 250]
    assert len(cues) == 2 * count
    assert len({ids[cue : cue + 2] for cue in cues}) == count  # each is told once, and answered once
    length = 2 + 2 * duo.PASSKEY_WORDS + 1
    told = {ids[cue : cue + length] for cue in cues[:count]}
    assert told == {ids[cue : cue + length] for cue in cues[count:]}
    assert all(passkey[-1] == 251 for passkey in told)
    assert cues[0] >= 3 + window_tokens // 16
    assert asked - (cues[count - 1] + length) >= window_tokens // 4
    assert exercise.places == tuple(cue + 1 + at for cue in cues[count:] for at in range(2 * duo.PASSKEY_WORDS))
    rest = [token for token in ids[:asked] if token < 200]
    assert tuple(rest) == window.ids
    assert make_exercise(window, PASSKEYS, (0, 0)) == exercise != make_exercise(window, PASSKEYS, (0, 1))


def test_passkeys_in_a_model_s_own_tokens(package: Package) -> None:
    text = text_of(package, "The maintainer uploads. Nobody else may, without consent. " * 20)
    window = cut_windows(text, Order(window_tokens=300, target="later"))[0]
    exercise = make_exercise(window, text.passkeys, (0, 0))
    found = Tokenizer.open(package.folder, package.manifest.tokenizer).decode(exercise.ids, special=True)
    passkeys = re.findall(r"\nThe passkey of the (\w+) vault is:((?: \w+)+)\.\n", found)
    assert len(passkeys) == 4
    assert sorted(passkeys[:2]) == sorted(passkeys[2:])
    assert all(len(words.split()) == duo.PASSKEY_WORDS for _, words in passkeys)
    assert found.endswith(".\n")
    assert "What are the passkeys of the vaults?<|im_end|>" in found


# --- the run


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duo, "STEPS", 6)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_a_run_writes_scores_and_figures(architecture: str, tmp_path: Path) -> None:
    package, stages = made(tmp_path, architecture), []
    record = calibrate_duo(package, TEXT, ORDER, threads=1, progress=lambda *given: stages.append(given))
    spec = package.spec
    scores = open_calibration(package, "duo", {SCORES: (spec.layers, spec.kv_heads)}).tensors[SCORES]
    np.testing.assert_allclose(record["score_of_head"], scores, atol=1e-5)
    windowed = np.array(spec.attention_windows) > 0
    assert (scores[windowed] == 1).all()
    assert ((scores[~windowed] >= 0) & (scores[~windowed] < 1)).all()
    assert stages == [("calibrating", 40 * step, 240) for step in range(7)]
    assert (record["tokens"], record["held_out_tokens"], record["window_tokens"], record["seed"]) == (240, 40, 40, 0)
    assert (record["steps"], len(record["distance_of_step"]), record["distance_of_step"][0]) == (6, 6, 0)
    assert 0 < record["distance_of_50"] < record["distance_of_100"]
    assert read_records(package.folder) == {"duo": record}
    assert not (package.folder / "calibration" / duo.STATE_FILE).exists()


@pytest.mark.parametrize("known", [(0, 1), (1, 0)])
def test_the_one_head_that_is_heard_comes_out_first(
    package: Package, known: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all others say is multiplied by nothing."""
    spec, matrix = package.spec, Decoder._matrix

    def heard(self: Decoder, role: str) -> Any:
        found = matrix(self, role)
        if role.endswith("attention_output"):
            by_head = found.view(spec.hidden, spec.kv_heads, -1)
            for head in range(spec.kv_heads):
                if role != f"layers.{known[0]}.attention_output" or head != known[1]:
                    by_head[:, head] = 0
        return found

    monkeypatch.setattr(Decoder, "_matrix", heard)
    monkeypatch.setattr(duo, "STEPS", 40)
    record = calibrate_duo(package, TEXT, ORDER, threads=1)
    gates, scores = np.array(record["gate_of_head"]), np.array(record["score_of_head"])
    assert scores.argmax() == np.ravel_multi_index(known, scores.shape)
    assert gates[known] > 0.2
    gates[known] = 0
    assert not gates.any()


class StopError(Exception):
    """Ctrl-C."""


@pytest.mark.usefixtures("few_steps")
def test_a_stopped_run_goes_on_and_ends_the_same(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole, stopped = (export_model(source, tmp_path / name) for name in ("whole", "stopped"))
    expected = calibrate_duo(whole, TEXT, ORDER, threads=1)
    steps, gradient = [], Student.gradient

    def count(self: Student, exercise: Exercise, gates: Any) -> Any:
        steps.append(exercise)
        return gradient(self, exercise, gates)

    monkeypatch.setattr(Student, "gradient", count)

    def stop(stage: str, done: int, total: int) -> None:
        if done >= 3 * 40:
            raise StopError

    with pytest.raises(StopError):
        calibrate_duo(stopped, TEXT, ORDER, threads=1, progress=stop)
    partial = stopped.folder / "calibration" / duo.STATE_FILE
    assert partial.exists()
    found = calibrate_duo(stopped, TEXT, ORDER, threads=1)
    assert len(steps) == 6
    assert found["sha256"] == expected["sha256"]
    assert found["distance_of_step"] == expected["distance_of_step"]
    partial.write_bytes(b"PK\x03\x04 not at all")
    assert calibrate_duo(stopped, TEXT, ORDER, threads=1)["sha256"] == expected["sha256"]
    assert len(steps) == 12
    with pytest.raises(StopError):
        calibrate_duo(stopped, TEXT, ORDER, threads=1, progress=stop)
    other = calibrate_duo(stopped, TEXT, replace(ORDER, seed=1), threads=1)  # begins anew
    assert len(steps) == 12 + 3 + 6
    assert other["sha256"] != expected["sha256"]


def test_a_short_text_is_refused(package: Package) -> None:
    with pytest.raises(OptionError, match="needs two windows of 200 or more"):
        calibrate_duo(package, TEXT, Order(window_tokens=200), threads=1)


def test_a_model_of_windows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="all layers of .* have windows of their own; no head of it need stream"):
        calibrate_duo(made(tmp_path, "phi3"), TEXT, ORDER, threads=1)
