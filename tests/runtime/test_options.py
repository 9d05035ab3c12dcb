"""Settings that contradict each other or the policy: each rule with what it refuses, and what it lets pass."""

from __future__ import annotations

from typing import Any

import pytest
from satchel.errors import OptionError
from satchel.runtime.options import Options

# policy and kv that are refused, the message, and the nearest that is not
RULES: list[tuple[str, dict[str, Any], str, str, dict[str, Any]]] = [
    ("full", {"hot_tokens": 500}, "leave out kv hot_tokens", "auto", {"hot_tokens": 500}),
    ("full", {"budget_bytes": "9MB"}, "leave out kv budget_bytes", "auto", {"budget_bytes": "9MB"}),
    ("auto", {"merge": "lookm"}, "merge=lookm is for a budget that forgets", "snapkv", {"merge": "lookm"}),
    ("auto", {"scorer": "kvzip"}, "scorer=kvzip ranks texts that were read whole", "kvzip", {}),
    ("full", {"scorer": "kvzip"}, "scorer=kvzip ranks texts that were read whole", "full", {"scorer": "snapkv"}),
    ("snapkv", {"merge": "chelsea"}, "would have no say; use policy recency", "recency", {"merge": "chelsea"}),
    ("kvzip", {"heads": "hybrid"}, "policy kvzip compiles what all heads have seen", "snapkv", {"heads": "hybrid"}),
    ("auto", {"streaming_heads": 25}, "which heads=all does not", "auto", {"heads": "razor", "streaming_heads": 25}),
    ("auto", {"heads": "hybrid", "streaming_heads": 25}, "set heads to one of razor", "auto", {"heads": "hybrid"}),
    ("full", {"lowrank": "think"}, "lowrank=think is for what policy auto archives", "auto", {"lowrank": "think"}),
    ("full", {"codec": "q4"}, "codec=q4 is for what policy auto archives", "auto", {"codec": "q4"}),
    ("snapkv", {"retriever": "minmax"}, "and policy snapkv archives", "auto", {"retriever": "minmax"}),
    ("full", {"recall_every": 4}, "recall_every=4 is for what", "auto", {"recall_every": 4}),
    ("recency", {"reach": 4096}, "reach=4096 is for what", "auto", {"reach": 4096}),
    ("recency", {"recall_tokens": 64}, "recall_tokens=64 is for what", "full", {"lowrank": "none"}),
    ("snapkv", {"scorer": "recency"}, "kv scorer=recency another", "snapkv", {"scorer": "snapkv"}),
    ("auto", {"rank": 20}, "rank=20 is of kv lowrank", "auto", {"rank": 20, "lowrank": "cskv"}),
    ("auto", {"lowrank": "cskv", "heads": "razor"}, "leave one", "auto", {"lowrank": "think", "heads": "razor"}),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "kv", "message", "other", "allowed"), RULES)
def test_contradictions(policy: str, kv: dict[str, Any], message: str, other: str, allowed: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=message):
        Options.check("1GB", policy, kv, 1, "cpu")
    checked = Options.check("1GB", other, allowed, 1, "cpu")
    assert checked.given == {*allowed}
