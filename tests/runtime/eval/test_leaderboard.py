"""The leaderboard: who takes part, in which order, what a stop costs, and what is written."""

from __future__ import annotations

import datetime
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_hold import made_up_spec, plan_of
from satchel.cache.codecs import codec_names
from satchel.cache.head_profiles import profile_names
from satchel.cache.lowrank import lowrank_names
from satchel.cache.mergers import merger_names
from satchel.cache.retrievers import retriever_names
from satchel.cache.scorers import scorer_names
from satchel.devices.reporting import Progress
from satchel.errors import MemoryLimitError, OptionError
from satchel.runtime.engines import Cancelled
from satchel.runtime.eval.leaderboard import (
    Board,
    BoardOrder,
    adopt,
    all_methods,
    describe,
    draw,
    methods,
    parse_budgets,
    prepare_board,
    ranked,
    read_earlier,
    to_markdown,
    winners,
)
from satchel.runtime.eval.leaderboard.methods import AUTO, USUAL, Budget, Method, find_methods
from satchel.runtime.eval.sides import Reply, Side, Talk
from satchel.runtime.eval.task import Sample
from satchel.runtime.options import Options

CONTEXT = 3500  # tokens, a byte each: eight questions need some
SUITES = ("needle", "ruler", "multiturn", "perplexity")
HALF, QUARTER, EIGHTH = Fraction(1, 2), Fraction(1, 4), Fraction(1, 8)


@pytest.fixture
def lay(
    tiny_gguf: Callable[..., Path], tiny_cache_dir: Path, tmp_path: Path, text_file: Path
) -> Callable[..., Board]:
    """``lay(["recency"], [QUARTER])``: a board of a tiny model, kept in the test's folder."""

    def made(names: Sequence[str], budgets: Sequence[Fraction], **given: Any) -> Board:
        order = BoardOrder(CONTEXT, budgets=budgets, methods=names, text=[text_file], **given)
        model = str(tiny_gguf(context_length=4096))
        return prepare_board(model, order, threads=1, cache_dir=tiny_cache_dir, out=tmp_path, notice=lambda _: None)

    return made


class FakeRunner:
    """Answers every question rightly or wrongly; fails at the document of a certain number."""

    vocab = 512

    def __init__(self, answer: str | None = None, fail_at: int = 0, error: Exception | None = None) -> None:
        self.answer, self.fail_at, self.read = answer, fail_at, 0
        self.error = error or Cancelled("stopped")

    def talk(self, sample: Sample, progress: Progress) -> Talk:
        self._begin(progress)
        texts = [question.references if self.answer is None else (self.answer,) for question in sample.questions]
        replies = tuple(Reply(" ".join(text), 5, 0.1, 2.0, "stop") for text in texts)
        return Talk(100, 0.5, replies, self.kv(), {"hot_tokens": 9, "chunk": 3, "window": 2})

    def walk(self, ids: Sequence[int], positions: Sequence[int], progress: Progress) -> Iterator[Any]:
        assert positions[-1] < len(ids)
        self._begin(progress)
        for _ in positions:
            yield np.zeros(self.vocab, np.float32)

    def _begin(self, progress: Progress) -> None:
        self.read += 1
        if self.read == self.fail_at:
            raise self.error
        progress("reading", 1, 1)

    def kv(self) -> Mapping[str, int]:
        return {"hot_bytes": 10_000, "warm_bytes": 0, "cold_bytes": 0, "digest_bytes": 500, "hot_tokens": 9,
                "total_tokens": 99}  # fmt: skip

    def plan(self) -> Mapping[str, int | str | None]:
        return {}

    def cancel(self) -> None:
        self.fail_at = self.read + 1

    def close(self) -> None:
        return


def opens(board: Board, runner: Callable[[Side], FakeRunner] = lambda _: FakeRunner()) -> list[str]:
    """Gives the board made-up runners; the list fills with the sides that it opens."""
    opened: list[str] = []

    def open_side(side: Side) -> FakeRunner:
        opened.append(side.label)
        return runner(side)

    board.open_side = open_side
    return opened


def can_recall(scorer: str) -> bool:
    """Whether policy ``auto`` takes it: one that must see a whole text first cannot be had there."""
    try:
        Options.check(None, "auto", {"scorer": scorer}, 1, "cpu")
    except OptionError:
        return False
    return True


# --- Who takes part ------------------------------------------------------------------------------------------------


def test_every_registry_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [method.name for method in all_methods()]
    assert len(set(names)) == len(names)
    rows = {"{}": scorer_names(), "auto+scorer={}": scorer_names(), "snapkv+merge={}": merger_names(),
            "auto+codec={}": codec_names(), "auto+retriever={}": retriever_names(),
            "auto+lowrank={}": lowrank_names(), "auto+heads={}": profile_names()}  # fmt: skip
    for form, found in rows.items():
        missing = [name for name in found if form.format(name) not in names]
        usual = {"auto+codec={}": ["q8"], "auto+retriever={}": ["channels"],  # what `auto` does anyway
                 "snapkv+merge={}": ["chelsea"]}  # which chooses itself
        assert [name for name in missing if form != "auto+scorer={}" or can_recall(name)] == usual.get(form, [])
    assert {"full", "auto", "snapkv+head_budgets=adaptive", "recency+merge=chelsea", "llama.cpp:q4_0"} < {*names}
    monkeypatch.setattr(methods, "KINDS", (lambda: [Method("auto", {"codec": "q2", "chunk": "64"})],))
    assert [method.name for method in all_methods()] == ["auto+codec=q2+chunk=64"]


def test_settings_that_exclude_each_other_are_no_method(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Method("auto", {"merge": "lookm"}), Method("auto", {"codec": "new"}), Method("recency")]
    monkeypatch.setattr(methods, "KINDS", (lambda: made,))
    assert [method.name for method in all_methods()] == ["recency"]


@pytest.mark.parametrize("share", [EIGHTH, QUARTER, Fraction(1, 16)])
@pytest.mark.parametrize("context", [700, 4096])
def test_every_method_is_a_side_that_can_be(share: Fraction, context: int) -> None:
    budget = Budget.of(share, context, 12_288)
    labels = set()
    for method in all_methods():
        side = method.side(budget if method.has_budget else None)
        side.check(1)
        labels.add(side.label)
        if method.has_budget and not method.recalls:
            assert side.kv["hot_tokens"] == int(context * share)
            assert {"budget_bytes"} & {*side.kv} == set()
        elif method.has_budget:
            assert side.kv["budget_bytes"] == int((context + 1024) * 12_288 * share)
    assert len(labels) == len(all_methods())


def test_a_scorer_has_most_of_its_budget_to_decide_about() -> None:
    for share in (EIGHTH, Fraction(1, 16), Fraction(1, 4)):
        budget = Budget.of(share, 4096, 12_288)
        assert sum(budget.pinned.values()) < 0.2 * budget.tokens
    assert Budget.of(EIGHTH, 4096, 12_288).pinned == {"sinks": 16, "window": 64}


@pytest.mark.parametrize(("share", "fits"), [(QUARTER, True), (EIGHTH, True), (Fraction(1, 16), False)])
def test_recall_leaves_room_for_scored_pairs(share: Fraction, fits: bool) -> None:
    spec = made_up_spec()
    budget = Budget.of(share, 4096, spec.kv_bytes_per_token)
    plan = plan_of(spec, 4096, Method(AUTO, {"scorer": USUAL.scorer}).side(budget).kv)
    assert (plan is not None) == fits
    if plan is not None:
        assert plan.codec is not None
        assert (plan.hot_tokens or 0) > 2 * ((plan.sinks or 0) + (plan.window or 0))


def test_streaming_heads_are_as_tight_as_the_others() -> None:
    """With the usual window they would take more than an eighth by themselves."""
    budget = Budget.of(EIGHTH, 4096, 12_288)
    side = Method(AUTO, {"heads": "hybrid"}).side(budget)
    assert side.kv == {"heads": "hybrid", "budget_bytes": budget.kv_bytes, "sinks": 16, "window": 64}


def test_references_come_along() -> None:
    assert [method.name for method in find_methods(["snapkv"])] == ["full", "snapkv"]
    assert [method.name for method in find_methods(["llama.cpp:q4_0"])] == ["full", "llama.cpp:f16", "llama.cpp:q4_0"]
    with pytest.raises(OptionError, match="method 'snap' is not known; choose from full, auto, recency"):
        find_methods(["snap"])


def test_budgets() -> None:
    assert parse_budgets("1/8, 0.25,1/8") == (EIGHTH, QUARTER)
    for text in ("8", "1/0", "half", "", "0", "-1/8"):
        with pytest.raises(OptionError, match="is not a share of the full cache between 0 and 1"):
            parse_budgets(text)


# --- What is measured, and when ------------------------------------------------------------------------------------


def test_the_order_is_breadth_first_and_a_model_is_loaded_once(lay: Callable[..., Board]) -> None:
    board = lay(["recency", "auto"], [EIGHTH, QUARTER], samples=2)
    opened = opens(board)
    board.run()
    once = ["full", "auto 1/8", "recency 1/8", "auto 1/4", "recency 1/4"]
    assert opened == once * 2, "the first samples of all, then the second ones"
    document = describe(board)
    assert [row["suites"]["ruler"]["samples"] for row in document["rows"]] == [4] * 5
    opened = opens(again := lay(["recency", "auto"], [EIGHTH, QUARTER], samples=2))
    again.run()
    assert opened == []
    assert describe(again) == document


@pytest.mark.parametrize("fail_at", range(1, 6))
def test_a_stop_loses_the_sample_under_way(lay: Callable[..., Board], fail_at: int) -> None:
    def runner(side: Side) -> FakeRunner:
        return FakeRunner(fail_at=fail_at if side.label != "full" else 0)

    board = lay(["recency"], [QUARTER])
    opens(board, runner)
    with pytest.raises(Cancelled):
        board.run()
    assert board.finished() == 5 + fail_at - 1
    assert to_markdown(describe(board)).count("Not measured yet: `recency`.") == 1
    again, told, runners = lay(["recency"], [QUARTER]), list[str](), list[FakeRunner]()

    def counted(_: Side) -> FakeRunner:
        runners.append(FakeRunner())
        return runners[-1]

    opens(again, counted)
    again.run(notice=told.append)
    assert told == [f"{5 + fail_at - 1} of 10 samples were done before and are not measured again"]
    assert sum(runner.read for runner in runners) == 5 - (fail_at - 1)
    assert ranked(describe(again), "1/4")[0]["method"] == "recency"


def test_measuring_anew_leaves_the_reference(lay: Callable[..., Board]) -> None:
    opens(board := lay(["recency"], [QUARTER]))
    board.run()
    board.forget()
    opened = opens(board)
    board.run()
    assert opened == ["recency 1/4"]


def test_rows_of_an_earlier_table_stay(lay: Callable[..., Board], tmp_path: Path) -> None:
    opens(board := lay(["recency", "knorm"], [QUARTER]))
    board.run()
    earlier = json.loads(json.dumps(describe(board, date=datetime.date(2020, 2, 3))))
    for file in tmp_path.glob("eval/*"):
        file.unlink()
    opened = opens(board := lay(["recency", "keydiff"], [EIGHTH, QUARTER]))
    assert adopt(board, earlier) == ""
    board.run()
    assert opened == ["full", "recency 1/8", "keydiff 1/8", "keydiff 1/4"]
    document = describe(board)
    assert {(row["method"], row["budget"]) for row in document["rows"]} == {
        ("full", None), ("recency", "1/8"), ("keydiff", "1/8"),
        ("recency", "1/4"), ("keydiff", "1/4"), ("knorm", "1/4"),
    }  # fmt: skip
    assert [budget["share"] for budget in document["budgets"]] == ["1/8", "1/4"]
    dates = {row["method"]: row["date"] for row in document["rows"] if row["budget"] == "1/4"}
    assert dates["recency"] == dates["knorm"] == "2020-02-03" < dates["keydiff"]
    assert f"| 2020-02-03, {dates['keydiff']} |" in to_markdown(document)
    opened = opens(board := lay(["recency", "keydiff"], [EIGHTH, QUARTER]))
    adopt(board, json.loads(json.dumps(document)))
    board.run()
    assert opened == []
    assert describe(board) == document


def test_rows_that_are_asked_for_again_do_not_stay(lay: Callable[..., Board], tmp_path: Path) -> None:
    opens(board := lay(["recency", "knorm"], [QUARTER]))
    board.run()
    earlier = describe(board)
    for file in tmp_path.glob("eval/*"):
        file.unlink()
    opened = opens(board := lay(["recency"], [QUARTER]))
    assert adopt(board, json.loads(json.dumps(earlier)), again=True) == ""
    board.run()
    assert opened == ["full", "recency 1/4"]
    assert set(board.kept) == {("knorm", "1/4")}


@pytest.mark.parametrize(("key", "value"), [("context", 9), ("text", ["b.txt"]), ("package", {}), ("samples", 7)])
def test_rows_of_another_comparison_do_not_stay(lay: Callable[..., Board], key: str, value: Any) -> None:
    opens(board := lay(["recency"], [QUARTER]))
    board.run()
    earlier = {**json.loads(json.dumps(describe(board))), key: value}
    assert adopt(again := lay(["recency"], [QUARTER]), earlier) == f"another {key}"
    assert not again.kept


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_an_earlier_table_that_is_damaged_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    assert read_earlier(tmp_path / "a.json") is None
    assert read_earlier(tmp_path / "b.json") is None


def test_cancel_between_two_methods(lay: Callable[..., Board]) -> None:
    board = lay(["recency", "knorm"], [QUARTER])
    opened = opens(board)
    with pytest.raises(Cancelled):
        board.run(keep=board.cancel)
    assert opened == ["full"]


def test_progress_goes_over_all_cells(lay: Callable[..., Board]) -> None:
    board, seen = lay(["recency"], [QUARTER]), list[tuple[str, int, int]]()
    opens(board)
    board.run(progress=lambda *told: seen.append(told))
    assert {total for _, _, total in seen} == {10 * CONTEXT}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("recency 1/4 (2 of 2)", 10 * CONTEXT, 10 * CONTEXT)


def test_what_the_plan_refuses_is_said(lay: Callable[..., Board]) -> None:
    refusal = MemoryLimitError("kv budget_bytes=9B is too little", smallest_bytes=10)

    def runner(side: Side) -> FakeRunner:
        if side.label == "knorm 1/4":
            raise refusal
        return FakeRunner(fail_at=1 if side.label == "auto 1/4" else 0, error=refusal)

    board = lay(["auto", "recency", "knorm"], [QUARTER])
    opens(board, runner)
    board.run()
    document = describe(board)
    assert [row["method"] for row in ranked(document, "1/4")] == ["recency"]
    text = to_markdown(document)
    for name in ("auto", "knorm"):
        assert f"- `{name}`: kv budget_bytes=9B is too little" in text


def test_the_full_cache_must_fit(lay: Callable[..., Board]) -> None:
    board = lay(["recency"], [QUARTER])
    opens(board, lambda _: FakeRunner(fail_at=1, error=MemoryLimitError("too little", smallest_bytes=1)))
    with pytest.raises(MemoryLimitError):
        board.run()


def test_a_method_without_its_calibration_is_listed(lay: Callable[..., Board]) -> None:
    board = lay(["recency", "kvzap", "auto+scorer=kvzap"], [QUARTER])
    opened = opens(board)
    board.run()
    assert opened == ["full", "recency 1/4"]
    text = to_markdown(describe(board))
    for name in ("kvzap", "auto+scorer=kvzap"):
        assert f"- `{name}`: not calibrated: satchel calibrate MODEL --method kvzap" in text


def test_llama_cpp_comes_last_and_brings_its_reference(lay: Callable[..., Board]) -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp is of the extra 'bench'")
    board = lay(["recency", "llama.cpp:q4_0"], [QUARTER])
    opened = opens(board)
    board.run()
    assert opened == ["full", "recency 1/4", "llama.cpp:f16", "llama.cpp:q4_0"]
    whole = ranked(describe(board), None)
    assert {row["method"] for row in whole} == {"full", "llama.cpp:f16", "llama.cpp:q4_0"}
    divergences = {row["method"]: row["suites"]["perplexity"]["summary"]["kl_nats"] for row in whole}
    assert divergences == {"full": None, "llama.cpp:f16": None, "llama.cpp:q4_0": pytest.approx(0, abs=1e-6)}


def test_llama_cpp_that_is_not_there_is_said(lay: Callable[..., Board], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else found(name))
    board = lay(["recency", "llama.cpp:q4_0"], [QUARTER])
    opened = opens(board)
    board.run()
    assert opened == ["full", "recency 1/4"]
    assert "- `llama.cpp:q4_0`: --against llama.cpp needs llama-cpp-python" in to_markdown(describe(board))


# --- What is written -----------------------------------------------------------------------------------------------


def test_rows_are_ranked_by_what_they_found(lay: Callable[..., Board]) -> None:
    answers = {"recency 1/4": "nothing", "knorm 1/4": None, "full": None}
    board = lay(["recency", "knorm"], [QUARTER])
    opens(board, lambda side: FakeRunner(answers[side.label]))
    board.run()
    document = describe(board)
    best, worst = ranked(document, "1/4")
    assert (best["method"], best["score"], worst["method"], worst["score"]) == ("knorm", 1.0, "recency", 0.0)
    assert winners(document, "1/4") == ["knorm"]
    assert best["suites"]["perplexity"]["summary"]["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert best["plan"]["hot_tokens"] == 9
    assert best["kv_bytes"] == 10_500
    lines = to_markdown(document).splitlines()
    places = [i for name in ("knorm", "recency") for i, line in enumerate(lines) if line.startswith(f"| `{name}`")]
    assert places[0] < places[1]
    assert lines[places[0]].startswith("| `knorm` | 100.0% | 100% (1.00) | 100% (1.00) | 100% (1.00) | 0.0000 |")
    assert "| 9 hot, chunk 3, window 2 |" in lines[places[0]]


def test_a_tiny_model_from_end_to_end(lay: Callable[..., Board], tmp_path: Path) -> None:
    names = ["auto+codec=q4", "snapkv+merge=lookm"]
    board = lay(names, [HALF])
    board.run()
    document = describe(board, command="satchel eval tiny.gguf --leaderboard")
    assert json.loads(json.dumps(document)) == document
    rows = ranked(document, "1/2")
    assert {row["method"] for row in rows} == {*names}
    full = ranked(document, None)[0]
    for row in rows:
        assert 0 < row["kv_bytes"] < full["kv_bytes"]
        assert row["suites"]["perplexity"]["summary"]["kl_nats"] > 0
        assert ("codec" in row["plan"]) == row["method"].startswith("auto")
    plans = {row["method"]: row["plan"] for row in rows}
    assert plans["auto+codec=q4"]["codec"] == "q4"
    assert "codec" not in plans["snapkv+merge=lookm"]
    text = to_markdown(document, picture="board.svg")
    assert all(fact in text for fact in ("# Leaderboard", "`satchel eval tiny.gguf --leaderboard`", "3,500 tokens",
                                         "![", "board.svg", "## 1/2 of the full cache", "## Whole caches"))  # fmt: skip


@pytest.mark.parametrize("name", ["board.png", "board.svg"])
def test_the_picture(lay: Callable[..., Board], tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib", reason="plots are of the extra 'eval'")
    board = lay(["auto", "recency"], [QUARTER])
    opens(board)
    board.run()
    draw(describe(board), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert data.startswith(b"\x89PNG") if name.endswith("png") else b"</svg>" in data
    draw(describe(lay(["knorm"], [EIGHTH], seed=8)), tmp_path / f"empty-{name}")
