"""The planner is held to the leaderboards that are committed in docs/: ``auto`` is unbeaten at every budget of theirs.

``satchel eval MODEL --leaderboard --table docs/leaderboard.md`` writes one. That the check notices what it should is
shown on tables that are made up here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from board_hold import complaints, made_up_spec, plan_now
from satchel.runtime.eval.leaderboard import to_markdown

DOCS = Path(__file__).parents[3] / "docs"
KV_BYTES = 8_000_000


@pytest.mark.parametrize("file", sorted(DOCS.glob("leaderboard*.json")), ids=lambda file: file.name)
def test_auto_is_what_wins(file: Path) -> None:
    document = json.loads(file.read_text(encoding="utf-8"))
    assert complaints(document) == []
    page = file.with_suffix(".md").read_text(encoding="utf-8")
    picture = file.with_suffix(".svg")
    assert page == to_markdown(document, picture=picture.name if picture.exists() else None)


def row(method: str, score: float, kl: float = 0.1, **plan: Any) -> dict[str, Any]:
    cells: dict[str, Any] = {
        name: {"summary": {"score": score}, "relative": score} for name in ("needle", "ruler", "multiturn")
    }
    cells["perplexity"] = {"summary": {"kl_nats": kl, "top1_agreement": 1.0}}
    return {"method": method, "budget": "1/8", "settings": {}, "suites": cells, "score": score, "plan": plan,
            "kv_bytes": 5, "kv_share": 0.1, "cold_bytes": 0, "read_tokens_per_second": 1,
            "decode_tokens_per_second": 1}  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    """A table on which all is well."""
    spec = json.loads(json.dumps(made_up_spec().to_json()))
    made: dict[str, Any] = {
        "context": 4096, "package": {"spec": spec, "weight_bytes": 500_000_000},
        "budgets": [{"share": "1/8", "tokens": 512, "kv_bytes": KV_BYTES}],
    }  # fmt: skip
    plan = plan_now(made, KV_BYTES)
    assert plan["codec"], "there is room for a plan"
    made["rows"] = [row("auto", 1.0, **plan), row("recency", 0.1), row("auto+codec=f16", 1.0, kl=0.01)]
    return made


def test_a_table_on_which_all_is_well(document: dict[str, Any]) -> None:
    assert complaints(document) == []


def test_a_method_that_beats_auto_is_noticed(document: dict[str, Any]) -> None:
    document["rows"].append(row("kvzap", 1.01))
    assert complaints(document) == [], "better than the full cache is chance"
    document["rows"][0]["score"] = 0.99
    assert complaints(document) == ["1/8: kvzap has beaten auto"]


def test_another_plan_is_noticed(document: dict[str, Any]) -> None:
    for key, value in (("codec", "q4"), ("retriever", "landmark"), ("recall_tokens", 7)):
        other = copy.deepcopy(document)
        other["rows"][0]["plan"][key] = value
        (found,) = complaints(other)
        assert f"auto plans {key}=" in found
        assert found.endswith(f"the table has {value}")


def test_a_budget_at_which_auto_was_refused_is_noticed(document: dict[str, Any]) -> None:
    document["rows"][0]["suites"]["needle"] = {"refused": "too little"}
    assert complaints(document) == ["1/8: auto is not measured"]
    document["budgets"][0]["kv_bytes"] = 1_000_000
    assert plan_now(document, 1_000_000) == {}
