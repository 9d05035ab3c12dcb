"""``runtime/bench``: the arithmetic with planted figures, our side on a tiny model, and everything that can fail."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from satchel.devices.reporting import log_notice, no_progress
from satchel.errors import ContextLengthError, DocumentError, MemoryLimitError, ModelError, OptionError, SatchelError
from satchel.runtime.bench import prepare
from satchel.runtime.bench.compare import Report, Side, compare
from satchel.runtime.bench.process import WORKER, run_worker
from satchel.runtime.bench.text import sentences

FIGURES = ["decode_tokens_per_second", "kv_bytes", "peak_rss_bytes", "prefill_tokens_per_second", "ttft_seconds"]
FAKE = """
import os, signal, sys, time
from types import SimpleNamespace

class Engine:
    def __init__(self, job, notice):
        self.job = job
        notice("a notice")
        print("noise on standard output")
    def prefill(self, ids, progress):
        progress("reading", len(ids), len(ids))
        {trouble}
        return SimpleNamespace(argmax=lambda: 3)
    def step(self, token):
        assert token == 3
        return SimpleNamespace(argmax=lambda: 3)
    def kv_bytes(self):
        return 1000
    def settings(self):
        return dict(heavy=[n for n in ("satchel", "onnxruntime", "numpy") if n in sys.modules], pid=os.getpid())

def open_engine(job, notice):
    return Engine(job, notice)
"""


def fake_engine(folder: Path, trouble: str = "pass") -> str:
    file = folder / "fake_engine.py"
    file.write_text(FAKE.replace("{trouble}", trouble), encoding="utf-8")
    return str(file)


def job(engine: str, **changes: Any) -> dict[str, Any]:
    return {"engine": engine, "ids": [1, 2, 3], "threads": 1, "decode_tokens": 4, "options": {}, **changes}


def worker(engine: str) -> dict[str, Any]:
    return run_worker(job(engine), label="fake", progress=no_progress, notice=log_notice)


# --- medians and ratios, with planted figures

PLANTED = {
    "satchel": [(30.0, 6.0, 1.0, 100, 11), (50.0, 2.0, 3.0, 300, 31), (40.0, 4.0, 2.0, 200, 21)],
    "llama_cpp": [(20.0, 1.0, 9.0, 800, 84), (10.0, 3.0, 7.0, 400, 42), (90.0, 2.0, 8.0, 600, 63)],
}


class Planted:
    """Stands for `run_worker`: the planted figures of each side, one after the other."""

    def __init__(self, fail_at: int = 0) -> None:
        self.labels: list[str] = []
        self.jobs: list[Mapping[str, Any]] = []
        self._fail_at = fail_at

    def __call__(self, job: Mapping[str, Any], *, label: str, progress: Any, notice: Any) -> dict[str, Any]:
        self.labels.append(label)
        self.jobs.append(job)
        if len(self.labels) == self._fail_at:
            raise SatchelError("it broke")
        progress("reading", 1, 2)
        notice("the same every time")
        row = PLANTED[job["engine"]][self.labels.count(label) - 1]
        names = ("prefill_tokens_per_second", "decode_tokens_per_second", "ttft_seconds", "peak_rss_bytes", "kv_bytes")
        return {**dict(zip(names, row, strict=True)), "settings": {"version": "1"}}


def planted_report(runs: int, keys: tuple[str, ...] = ("satchel", "llama_cpp"), **more: Any) -> Report:
    sides = [Side(key, key.upper(), key, {"model": f"{key}.gguf"}) for key in keys]
    given = {"progress": no_progress, "notice": log_notice, "measure": Planted(), **more}
    return compare(sides, [7, 8], runs=runs, threads=2, decode_tokens=32, **given)


def test_medians_and_ratios_and_the_exact_keys() -> None:
    assert planted_report(3).to_json() == {
        "context": 2,
        "runs": 3,
        "satchel": {
            "prefill_tokens_per_second": 40.0, "decode_tokens_per_second": 4.0, "ttft_seconds": 2.0,
            "peak_rss_bytes": 200, "kv_bytes": 21,
        },
        "llama_cpp": {
            "prefill_tokens_per_second": 20.0, "decode_tokens_per_second": 2.0, "ttft_seconds": 8.0,
            "peak_rss_bytes": 600, "kv_bytes": 63,
        },
        "ratio": {"prefill": 2.0, "decode": 2.0, "peak_rss": 200 / 600, "kv_bytes": 21 / 63},
        "settings": {
            "threads": 2, "decode_tokens": 32,
            "satchel": {"model": "satchel.gguf", "version": "1"},
            "llama_cpp": {"model": "llama_cpp.gguf", "version": "1"},
        },
    }  # fmt: skip


def test_an_even_number_of_runs_keeps_bytes_whole() -> None:
    found = planted_report(2).to_json()["satchel"]
    assert found["prefill_tokens_per_second"] == 40.0
    assert (found["peak_rss_bytes"], type(found["peak_rss_bytes"])) == (200, int)


def test_alone_there_is_nothing_to_divide_by() -> None:
    found = planted_report(1, ("satchel",)).to_json()
    assert sorted(found) == ["context", "runs", "satchel", "settings"]


def test_sides_take_turns_with_the_same_job_and_say_things_once() -> None:
    measure, stages, told = Planted(), [], []
    planted_report(2, measure=measure, progress=lambda stage, *_: stages.append(stage), notice=told.append)
    assert measure.labels == ["SATCHEL", "LLAMA_CPP"] * 2
    shared = [{key: job[key] for key in ("ids", "threads", "decode_tokens")} for job in measure.jobs]
    assert shared == [{"ids": [7, 8], "threads": 2, "decode_tokens": 32}] * 4
    assert told == ["the same every time"]
    assert stages[:2] == ["run 1 of 2, SATCHEL: loading", "run 1 of 2, SATCHEL: reading"]


def test_one_failure_ends_it() -> None:
    measure = Planted(fail_at=2)
    with pytest.raises(SatchelError, match="it broke"):
        planted_report(3, measure=measure)
    assert len(measure.labels) == 2


# --- the worker process


def test_a_worker_measures_without_our_libraries(tmp_path: Path) -> None:
    stages, told = [], []
    result = run_worker(
        job(fake_engine(tmp_path)), label="fake", progress=lambda *step: stages.append(step), notice=told.append
    )
    settings = result.pop("settings")
    assert settings["heavy"] == []
    assert sorted(result) == FIGURES
    assert result["kv_bytes"] == 1000
    assert result["peak_rss_bytes"] > 1_000_000
    assert all(result[name] > 0 for name in FIGURES)
    assert stages == [("reading", 3, 3)]
    assert told == ["a notice"]


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("raise ValueError('no\\n such  tensor')", ModelError, "the fake measurement failed: no such tensor"),
        ("raise ValueError", ModelError, "the fake measurement failed: ValueError"),
        ("import surely_not_there", ModelError, "the fake measurement failed: No module named"),
        ("os.kill(os.getpid(), signal.SIGKILL)", SatchelError, "was killed (signal 9), most likely for want of mem"),
        ("os.abort()", SatchelError, "was ended by signal 6 before it had a result"),
        ("print('why', file=sys.stderr); os._exit(5)", SatchelError, "exit code 5 before it had a result: why"),
        ("import satchel; raise satchel.OptionError('ours')", OptionError, "ours"),
    ],
)
def test_whatever_happens_to_a_worker_is_a_clear_error(
    tmp_path: Path, trouble: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(SatchelError) as caught:
        worker(fake_engine(tmp_path, trouble))
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_memory_limit_keeps_its_number(tmp_path: Path) -> None:
    trouble = "import satchel; raise satchel.MemoryLimitError('too little', smallest_bytes=77)"
    with pytest.raises(MemoryLimitError, match="too little") as caught:
        worker(fake_engine(tmp_path, trouble))
    assert caught.value.smallest_bytes == 77


def test_stopping_ends_the_worker(tmp_path: Path) -> None:
    mark = tmp_path / "late"
    engine = fake_engine(tmp_path, f"time.sleep(1); open({str(mark)!r}, 'w')")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(job(engine), label="fake", progress=stop, notice=log_notice)
    time.sleep(1.2)
    assert not mark.exists()


def test_a_worker_does_not_outlive_its_parent(tmp_path: Path) -> None:
    line = json.dumps({**job(fake_engine(tmp_path, "time.sleep(60)")), "path": sys.path}) + "\n"
    with subprocess.Popen([sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as started:
        assert started.stdin is not None
        started.stdin.write(line.encode())
        started.stdin.close()  # as when the parent is gone
        assert started.wait(20) == 3


# --- our side, on a tiny model


def helper(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "helpers" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = helper("tiny_models").write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    return path


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_our_side_beside_a_fake_peer(tiny: Path, cache_dir: Path, tmp_path: Path) -> None:
    contest = prepare(str(tiny), 100, runs=1, threads=2, cache_dir=cache_dir, policy="full", kv={"chunk": 32})
    peer = Side("llama_cpp", "fake", fake_engine(tmp_path), {"model": "peer.gguf"})
    found = replace(contest, sides=(*contest.sides, peer)).run().to_json()
    assert list(found) == ["context", "runs", "satchel", "llama_cpp", "ratio", "settings"]
    assert (found["context"], found["runs"]) == (100, 1)
    for side in ("satchel", "llama_cpp"):
        assert sorted(found[side]) == FIGURES
        assert all(value > 0 for value in found[side].values())
    assert sorted(found["ratio"]) == ["decode", "kv_bytes", "peak_rss", "prefill"]
    assert found["ratio"]["kv_bytes"] == found["satchel"]["kv_bytes"] / 1000
    ours = found["settings"]["satchel"]
    assert (ours["policy"], ours["chunk"], ours["hot_tokens"], ours["storage"]) == ("full", 32, None, "bf16")
    assert found["settings"]["text"] == "built-in prose"
    assert ours["model"].startswith(str(cache_dir))


def test_our_settings_reach_our_side(tiny: Path, cache_dir: Path) -> None:
    kv = {"hot_tokens": "40", "sinks": "4", "window": "16", "chunk": "32", "storage": "fp32"}
    told: list[str] = []
    contest = prepare(str(tiny), 100, runs=1, threads=1, cache_dir=cache_dir, kv=kv, policy="recency")
    found = contest.run(notice=told.append).to_json()
    ours = found["settings"]["satchel"]
    assert (ours["policy"], ours["hot_tokens"], ours["storage"], ours["sinks"]) == ("recency", 40, "fp32", 4)
    assert len(told) == 1
    assert "40 of 100 tokens stay hot" in told[0]


def test_a_memory_limit_is_ours_to_break(tiny: Path, cache_dir: Path) -> None:
    contest = prepare(str(tiny), 100, runs=1, cache_dir=cache_dir, memory="1MB")
    with pytest.raises(MemoryLimitError, match="1MB of memory is too little") as caught:
        contest.run()
    assert caught.value.smallest_bytes > 1_000_000


def test_a_package_will_do_for_our_side_alone(tiny: Path, cache_dir: Path) -> None:
    package = prepare(str(tiny), 10, cache_dir=cache_dir).sides[0].options["model"]
    assert len(prepare(package, 10, cache_dir=cache_dir).text.ids) == 10
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: the error for a folder comes after that one")
    with pytest.raises(ModelError, match=r"is a folder, but llama.cpp reads .gguf files"):
        prepare(package, 10, cache_dir=cache_dir, against="llama.cpp")


# --- the tokens


def test_the_text_is_cut_or_repeated_to_the_token(tiny: Path, cache_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Seven times seven is forty-nine.", encoding="utf-8")
    whole = prepare(str(tiny), 10, text=file, cache_dir=cache_dir).text
    more = prepare(str(tiny), 100, text=file, cache_dir=cache_dir).text
    assert (len(whole.ids), whole.repeats) == (10, 1)
    assert len(more.ids) == 100
    assert more.repeats > 1
    assert more.source == str(file)
    assert more.ids[:10] == whole.ids


def test_made_up_prose_is_the_same_every_time(tiny: Path, cache_dir: Path) -> None:
    short, long = (prepare(str(tiny), count, cache_dir=cache_dir).text for count in (33, 300))
    assert (len(short.ids), len(long.ids)) == (33, 300)
    assert long.ids[:33] == short.ids
    some = list(islice(sentences(), 1000))
    assert len(set(some)) > 950
    assert some == list(islice(sentences(), 1000))


# --- what a person can get wrong


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (
            {"context": 481, "policy": "full"}, ContextLengthError,
            "more than the 512 tokens that the model .* reads; give 480 or less",
        ),
        ({"context": 0}, OptionError, "context is 0 and runs is 3; give 1 or more"),
        ({"runs": 0}, OptionError, "runs is 0"),
        ({"policy": "best"}, OptionError, "policy 'best' is not known"),
        ({"kv": {"hot": "1"}}, OptionError, "kv setting 'hot' is not known"),
        ({"threads": 0}, OptionError, "threads is 0"),
        ({"memory": "much"}, OptionError, "'much' is not a size"),
        ({"against": "vllm"}, OptionError, r"cannot compare with 'vllm'; known are llama.cpp and llama.cpp:PATH"),
        ({"model": "./none.gguf"}, ModelError, "does not exist"),
    ],
)
def test_bad_arguments(tiny: Path, cache_dir: Path, more: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"model": str(tiny), "context": 10, "cache_dir": cache_dir, **more}
    with pytest.raises(kind, match=message):
        prepare(**given)


def test_an_empty_text_is_refused(tiny: Path, cache_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.write_text("", encoding="utf-8")
    with pytest.raises(DocumentError, match="empty.txt"):
        prepare(str(tiny), 10, text=file, cache_dir=cache_dir)


def test_a_missing_peer_names_the_extra(tiny: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("satchel.runtime.bench.run.importlib.util.find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r'pip install "satchel\[bench\]"'):
        prepare(str(tiny), 10, cache_dir=cache_dir, against="llama.cpp")


def test_the_peer_gets_the_same_file_or_the_one_that_is_named(
    tiny: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("satchel.runtime.bench.run.importlib.util.find_spec", lambda _: object())
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    same = prepare(str(tiny), 10, cache_dir=cache_dir, against="llama.cpp")
    named = prepare(str(tiny), 10, cache_dir=cache_dir, against=f"llama.cpp:{other}")
    assert [side.key for side in same.sides] == ["satchel", "llama_cpp"]
    assert [contest.sides[1].options["model"] for contest in (same, named)] == [str(tiny), str(other)]
    with pytest.raises(ModelError, match=r"nowhere.gguf does not exist"):
        prepare(str(tiny), 10, cache_dir=cache_dir, against="llama.cpp:nowhere.gguf")
