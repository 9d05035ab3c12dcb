"""Whole evaluations of a tiny model: every suite, what is kept, what is measured again, and planted records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from satchel.devices.reporting import Progress
from satchel.errors import ContextLengthError, ModelError, OptionError, StorageError
from satchel.runtime.engines import Cancelled
from satchel.runtime.eval import Evaluation, Order, Report, SideReport, find_suite, prepare, suite_names, write_plot
from satchel.runtime.eval.perplexity import log_softmax, window_positions
from satchel.runtime.eval.report import summarize
from satchel.runtime.eval.results import Results, read_rows, write_rows
from satchel.runtime.eval.sides import Reply, Talk, name_sides
from satchel.runtime.eval.task import Sample

SMALL = {"hot_tokens": "64", "sinks": "4", "window": "16", "chunk": "32"}


@pytest.fixture
def begin(
    tiny_gguf: Callable[..., Path], tiny_cache_dir: Path, tmp_path: Path, text_file: Path
) -> Callable[..., Evaluation]:
    """``begin("needle", 900, policy="recency")``: an evaluation of a tiny model, kept in the test's folder."""

    def made(suite: str, context: int, **given: Any) -> Evaluation:
        gguf = given.pop("gguf", {})
        order = {name: given.pop(name) for name in ("samples", "windows", "tasks", "seed") if name in given}
        options = {"cache_dir": tiny_cache_dir, "out": tmp_path, "threads": 2, "notice": lambda _: None, **given}
        model = str(tiny_gguf(context_length=4096, **gguf))
        return prepare(model, Order(suite, context, text=[text_file], **order), **options)

    return made


class FakeRunner:
    """Answers with what it is told, or fails at a sample of a certain number."""

    vocab = 8

    def __init__(self, answer: str = "", fail_at: int | None = None) -> None:
        self.answer, self.fail_at, self.talks = answer, fail_at, 0

    def talk(self, sample: Sample, progress: Progress) -> Talk:
        self.talks += 1
        if self.talks == self.fail_at:
            raise Cancelled("stopped")
        progress("reading", 1, 1)
        asked = sample.questions
        replies = tuple(Reply(self.answer or question.references[0], 5, 0.1, 2.0, "stop") for question in asked)
        kv = {"hot_bytes": 10, "warm_bytes": 3, "cold_bytes": 7, "digest_bytes": 2, "hot_tokens": 5, "total_tokens": 9}
        return Talk(100, 0.5, replies, kv)

    def walk(self, ids: Sequence[int], *_: Any) -> Iterator[np.ndarray[Any, Any]]:
        raise AssertionError(f"not asked for: {ids}")

    def kv(self) -> Mapping[str, int]:
        return {}

    def cancel(self) -> None:
        self.fail_at = self.talks + 1

    def close(self) -> None:
        return


@pytest.mark.parametrize("suite", [name for name in suite_names() if name != "perplexity"])
def test_every_suite_runs_on_a_tiny_model(begin: Callable[..., Evaluation], suite: str) -> None:
    context = 3500 if suite == "multiturn" else 1500
    report = begin(suite, context, samples=1, policy="recency", kv=SMALL).run()
    assert set(report.sides) == {"recency", "full"}
    assert set(report.sides["full"].tasks) == set(find_suite(suite).tasks)
    full, ours = report.sides["full"], report.sides["recency"]
    assert full.kv_bytes > 2 * ours.kv_bytes > 0
    assert ours.full_kv_bytes == pytest.approx(full.full_kv_bytes, rel=0.1)
    assert 0 <= (full.overall["score"] or 0) <= 1
    assert full.read_tokens_per_second > 0
    assert full.decode_tokens_per_second > 0
    found = report.to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["sides"]["recency"]["kv"] == SMALL


@pytest.mark.parametrize(
    ("policy", "kv", "label"),
    [("recency", SMALL, "recency"), ("full", {"heads": "hybrid", "sinks": "4", "window": "16"}, "full (as set)")],
)
def test_perplexity_beside_the_full_cache(
    begin: Callable[..., Evaluation], policy: str, kv: dict[str, str], label: str
) -> None:
    report = begin("perplexity", 600, samples=20, windows=2, policy=policy, kv=kv).run()
    full, ours = report.sides["full"].overall, report.sides[label].overall
    assert full["kl_nats"] is None
    assert ours["kl_nats"] is not None
    assert ours["kl_nats"] > 1e-4
    assert 0 <= (ours["top1_agreement"] or 0) <= 1
    assert 1 < (full["perplexity"] or 0) < math.inf
    assert report.relative == {}


def test_a_budget_for_everything_is_the_full_cache(begin: Callable[..., Evaluation]) -> None:
    ours = begin("perplexity", 600, samples=16, policy="recency", kv={"hot_tokens": "1000"}).run().sides["recency"]
    assert ours.overall["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert ours.overall["top1_agreement"] == 1


def test_perplexity_is_that_of_the_model(begin: Callable[..., Evaluation], load_tiny: Callable[..., Any]) -> None:
    evaluation = begin("perplexity", 64, samples=4, policy="full", against=["none"])
    (item,) = evaluation.items
    found = evaluation.run().sides["full"].overall["perplexity"]
    model = load_tiny(policy="full")
    ids, positions = item.ids, item.positions  # type: ignore[attr-defined]
    nll = [-log_softmax(model.logits(ids[: place + 1]))[ids[place + 1]] for place in positions]
    assert found == pytest.approx(math.exp(sum(nll) / 4), rel=1e-3)


@pytest.mark.parametrize(("context", "samples"), [(16, 4), (17, 100), (1000, 64), (1001, 3)])
def test_positions_lie_in_the_second_half(context: int, samples: int) -> None:
    positions = window_positions(context, samples)
    assert len(positions) == len(set(positions)) == min(samples, context - context // 2)
    assert positions[0] == context // 2 - 1
    assert positions[-1] + 1 < context
    gaps = np.diff(positions)
    assert gaps.max() - gaps.min() <= 1


def test_a_run_goes_on_where_it_was_stopped(begin: Callable[..., Evaluation]) -> None:
    def evaluation(runner: FakeRunner, told: list[str], **more: Any) -> Evaluation:
        made = begin("needle", 900, samples=5, policy="full", against=["none"], **more)
        made.open_side = lambda _: runner
        return made

    stopped = evaluation(FakeRunner(fail_at=3), [])
    with pytest.raises(Cancelled):
        stopped.run()
    assert stopped.finished() == 2
    runner, told = FakeRunner(), list[str]()
    report = evaluation(runner, told).run(notice=told.append)
    assert runner.talks == 3
    assert told == ["2 of 5 samples were done before and are not measured again"]
    assert (report.reused, report.sides["full"].samples, report.sides["full"].overall["score"]) == (2, 5, 1.0)
    assert report.sides["full"].kv_bytes == 15
    assert report.sides["full"].cold_bytes == 7
    again = FakeRunner()
    evaluation(again, [], fresh=True).run()
    assert again.talks == 5
    other = FakeRunner()
    evaluation(other, [], seed=8).run()
    assert other.talks == 5


def test_the_full_cache_is_measured_once_for_all(begin: Callable[..., Evaluation]) -> None:
    for policy, expected in (("recency", {"recency", "full"}), ("snapkv", {"snapkv"})):
        opened = set[str]()
        evaluation = begin("needle", 900, samples=1, policy=policy, kv=SMALL)

        def open_side(side: Any, opened: set[str] = opened) -> FakeRunner:
            opened.add(side.label)
            return FakeRunner()

        evaluation.open_side = open_side
        evaluation.run()
        assert opened == expected


def test_cancel_before_and_between(begin: Callable[..., Evaluation]) -> None:
    evaluation = begin("needle", 900, samples=2, policy="full", against=["none"])
    evaluation.cancel()
    evaluation.open_side = lambda _: FakeRunner()
    with pytest.raises(Cancelled):
        evaluation.run()
    assert evaluation.finished() == 0


def test_a_real_run_is_cancelled(begin: Callable[..., Evaluation]) -> None:
    evaluation = begin("needle", 900, samples=2, policy="full", against=["none"])

    def progress(stage: str, done: int, total: int, /) -> None:
        if done > total // 2:  # in the second sample
            evaluation.cancel()

    with pytest.raises(Cancelled):
        evaluation.run(progress=progress)
    assert evaluation.finished() == 1


@pytest.mark.parametrize("cut", [1, 10, 29])
def test_a_broken_last_line_is_ignored(tmp_path: Path, cut: int) -> None:
    results = Results(tmp_path / "eval", {"task": "x"})
    results.append({"sample": "0", "score": 1.0, "text": "ünï"})
    results.append({"sample": "1", "score": 0.5})
    results.file.write_bytes(results.file.read_bytes()[:-cut])
    again = Results(tmp_path / "eval", {"task": "x"})
    assert "0" in again
    assert "1" not in again or cut == 1
    again.append({"sample": "2", "score": 0.25})
    last = Results(tmp_path / "eval", {"task": "x"})
    assert last["0"]["text"] == "ünï"
    assert last["2"]["score"] == 0.25


def test_results_of_other_settings_are_other_files(tmp_path: Path) -> None:
    assert Results(tmp_path, {"seed": 1}).file != Results(tmp_path, {"seed": 2}).file


def test_rows_are_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "rows.npy"
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_rows(file, rows, (2, 3))
    found = read_rows(file)
    assert found is not None
    assert np.array_equal(found, rows)

    def broken() -> Iterator[np.ndarray[Any, Any]]:
        yield rows[0]
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        write_rows(tmp_path / "other.npy", broken(), (2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]
    file.write_bytes(file.read_bytes()[:-4])
    assert read_rows(file) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = Results(tmp_path / "file2", {})
    results.file = tmp_path / "file" / "x.jsonl"
    with pytest.raises(StorageError, match="make room or name another folder"):
        results.append({"sample": "0"})


@pytest.mark.parametrize(
    ("suite", "context", "given", "message"),
    [
        ("needle", 100, {}, "too small for task needle"),
        ("multiturn", 800, {}, "too small for task multiturn"),
        ("ruler", 700, {"tasks": ["vt"]}, "too small for task vt"),
        ("perplexity", 8, {}, "give --context 16 or more"),
        ("needle", 5000, {}, "give 4,096 or less"),
    ],
)
def test_contexts_that_do_not_work(
    begin: Callable[..., Evaluation], suite: str, context: int, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContextLengthError, match=message):
        begin(suite, context, **given)


@pytest.mark.parametrize("task", find_suite("ruler").tasks)
def test_the_smallest_context_works(begin: Callable[..., Evaluation], task: str) -> None:
    with pytest.raises(ContextLengthError) as caught:
        begin("ruler", 20, tasks=[task], samples=2)
    least = int(str(caught.value).split("--context ")[-1].split()[0])
    evaluation = begin("ruler", least, tasks=[task], samples=2)
    for item in evaluation.items:
        sample = item.filler.fill(item.task_object, item.place)  # type: ignore[attr-defined]
        assert evaluation.asked.speaker.tokens(sample) <= least
    with pytest.raises(ContextLengthError):
        begin("ruler", least - 1, tasks=[task], samples=2)


def test_unknown_names(begin: Callable[..., Evaluation]) -> None:
    with pytest.raises(OptionError, match="suite 'longbench' is not known; choose one of needle, ruler"):
        begin("longbench", 900)
    with pytest.raises(OptionError, match="task 'single_9' is not known in suite ruler; choose from single_1"):
        begin("ruler", 900, tasks=["single_9"])
    with pytest.raises(OptionError, match="policy 'best' is not known"):
        begin("needle", 900, policy="best")
    with pytest.raises(OptionError, match="samples is 0"):
        begin("needle", 900, samples=0)


def test_sides() -> None:
    sides = name_sides("snapkv", {"hot_tokens": 64}, "1GB", ["full,recency", "llama.cpp:q4_0", "llama.cpp"])
    assert [side.label for side in sides] == ["snapkv", "full", "recency", "llama.cpp:q4_0", "llama.cpp:f16"]
    assert (sides[1].kv, sides[1].memory) == ({}, None)
    assert (sides[2].kv, sides[2].memory) == ({"hot_tokens": 64}, "1GB")
    assert (sides[0].reference, sides[3].reference) == ("full", "llama.cpp:f16")
    assert [side.label for side in name_sides("full", {}, None, ["full"])] == ["full"]
    assert [side.label for side in name_sides("full", {}, "1GB", ["full"])] == ["full (as set)", "full"]
    assert [side.label for side in name_sides("auto", {}, None, ["none"])] == ["auto"]


@pytest.mark.parametrize(
    ("against", "message"),
    [(["llama.cpp:q3_k"], "KV type 'q3_k' is not known; choose one of f16"), (["none", "full"], "none excludes full")],
)
def test_sides_that_cannot_be(against: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        name_sides("auto", {}, None, against)


def test_a_peer_needs_a_gguf(tmp_path: Path, begin: Callable[..., Evaluation]) -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp is of the extra 'bench'")
    with pytest.raises(ModelError, match="llama.cpp reads .gguf files"):
        prepare(str(tmp_path), Order("needle", 900), against=["llama.cpp"])


@pytest.mark.parametrize("suite", ["multiturn", "perplexity"])
def test_llama_cpp_reads_the_same(begin: Callable[..., Evaluation], suite: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp is of the extra 'bench'")
    against = ["full", "llama.cpp:f16", "llama.cpp:q8_0"]
    # heads of 32, a block of q8_0; llama.cpp's threads wait busily for each other
    given = {"samples": 1 if suite == "multiturn" else 8, "gguf": {"hidden": 128, "layers": 1}, "threads": 1}
    report = begin(suite, 2800, policy="full", against=against, **given).run()
    full, peer, small = (report.sides[name] for name in against)
    assert peer.full_kv_bytes == pytest.approx(full.full_kv_bytes, rel=0.3)
    assert small.kv_bytes < 0.7 * peer.kv_bytes
    if suite == "perplexity":
        assert peer.overall["perplexity"] == pytest.approx(full.overall["perplexity"], rel=0.1)
        assert 0 < (small.overall["kl_nats"] or 0) < 0.5


def report_of(*figures: tuple[str, dict[str, float], float]) -> Report:
    sides = {
        label: SideReport({}, {task: {"score": value} for task, value in tasks.items()},
                          {"score": sum(tasks.values()) / len(tasks)}, 1, kv, 0.0, 1000.0, 10.0, 5.0)
        for label, tasks, kv in figures
    }  # fmt: skip
    return Report({"model": "m", "suite": "ruler", "context": 9}, sides, ("score",), 0)


def test_relative_scores_leave_hard_tasks_out() -> None:
    report = report_of(("auto", {"a": 0.9, "b": 0.3, "c": 0.4}, 100), ("full", {"a": 1.0, "b": 0.1, "c": 0.5}, 800))
    assert report.relative == {"full": {"ratio": pytest.approx(1.3 / 1.5), "tasks": ["a", "c"]}}


def test_summary_of_records() -> None:
    turn = {"new_tokens": 11, "decode_seconds": 2.0}
    kv = {"hot_bytes": 1, "warm_bytes": 2, "cold_bytes": 4, "digest_bytes": 3, "total_tokens": 10}
    records = [{"turns": [turn, turn], "read_seconds": 2.0, "document_tokens": 100, "kv": kv}] * 2
    side = summarize({}, {"a": {"score": 1.0}, "b": {"score": 0.5}}, records, kv_bytes_per_token=3)
    assert (side.overall["score"], side.kv_bytes, side.cold_bytes, side.full_kv_bytes) == (0.75, 6, 4, 30)
    assert (side.kv_share, side.read_tokens_per_second, side.decode_tokens_per_second) == (0.2, 50, 5)


@pytest.mark.parametrize("name", ["scores.png", "scores.svg"])
def test_plot(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib", reason="plots are of the extra 'eval'")
    report = report_of(("auto", {"a": 0.9}, 100), ("full", {"a": 1.0}, 800))
    write_plot(report, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert data.startswith(b"\x89PNG") if name.endswith("png") else b"</svg>" in data
