"""Whether the planner keeps to a leaderboard: at each budget policy ``auto`` must be unbeaten, and still plan what was
measured then."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from satchel.devices.planner import Plan, make_plan
from satchel.errors import MemoryLimitError
from satchel.export.spec import ModelSpec, RopeSpec
from satchel.runtime.eval.leaderboard import ranked, winners
from satchel.runtime.memory import costs_of
from satchel.runtime.model import ANSWER_ROOM
from satchel.runtime.options import Options

PLENTY = 1 << 40  # bytes of memory and disk: the budget is what is short
DECIDED = ("codec", "retriever", "recall_tokens")  # what makes a method of a plan; its sizes follow the text


def complaints(document: Mapping[str, Any]) -> list[str]:
    """One line for each budget and reason; none when all is well."""
    found = []
    for budget in document["budgets"]:
        share = budget["share"]
        row = next((row for row in ranked(document, share) if row["method"] == "auto"), None)
        if row is None:
            found.append(f"{share}: auto is not measured")
            continue
        best = winners(document, share)
        if "auto" not in best:
            found.append(f"{share}: {best[0]} has beaten auto")
        now = plan_now(document, budget["kv_bytes"])
        found += [
            f"{share}: auto plans {key}={now.get(key)}, the table has {row['plan'].get(key)}"
            for key in DECIDED if now.get(key) != row["plan"].get(key)
        ]  # fmt: skip
    return found


def plan_now(document: Mapping[str, Any], budget_bytes: int) -> dict[str, Any]:
    """What policy ``auto`` decides within a budget for the table's model and context; nothing when it refuses."""
    spec = ModelSpec.from_json(document["package"]["spec"])
    plan = plan_of(spec, document["context"], {"budget_bytes": budget_bytes}, document["package"]["weight_bytes"])
    if plan is None or plan.codec is None:
        return {}
    return {"codec": plan.codec, "retriever": plan.retriever, "recall_tokens": plan.recall_tokens}


def plan_of(spec: ModelSpec, context: int, kv: Mapping[str, object], weight_bytes: int = 0) -> Plan | None:
    """What policy ``auto`` plans with these settings where nothing but them is short; None when it refuses."""
    package: Any = SimpleNamespace(spec=spec, weight_bytes=weight_bytes, manifest=SimpleNamespace(flavour="native"))
    options = Options.check(None, "auto", kv, 1, "cpu")
    windows = spec.attention_windows if any(spec.attention_windows) else ()
    try:
        return make_plan(
            costs_of(package, options.settings, process_bytes=0, windows=windows), PLENTY,
            tokens=context + ANSWER_ROOM, least_hot_tokens=options.settings.least_hot_tokens,
            wishes=options.wishes, archive=options.recalls, disk_bytes=PLENTY, longest_tokens=spec.context_length,
        )  # fmt: skip
    except MemoryLimitError:
        return None


def made_up_spec() -> ModelSpec:
    """As large as the default model."""
    return ModelSpec(
        architecture="llama", name="made up", layers=24, hidden=896, heads=14, kv_heads=2, head_size=64,
        feed_forward=4864, vocab=1000, context_length=32768, norm_epsilon=1e-6, rope=RopeSpec(1e6, 64),
        tied_embeddings=True, attention_scale=0.125,
    )  # fmt: skip
