"""Settings of the KV cache that a model's file brings (``satchel.kv.*`` in our GGUF files): defaults of ``--kv``."""

from __future__ import annotations

from collections.abc import Mapping

from ..cache import CacheSettings
from ..cache.scorers import scorer_names
from ..cache.settings import OF_ARCHIVE, OF_FORGETTING
from ..devices.reporting import Notice
from ..errors import OptionError
from ..export.package import Package
from .engines.rules import find_rules

BUDGETS = ("hot_tokens", "budget_bytes")  # what policy ``full`` excludes


def with_settings_of(
    package: Package, kv: Mapping[str, object] | None, policy: str, engine: str, notice: Notice
) -> dict[str, object]:
    """``kv`` with the file's settings where it has none; ``notice`` is told which of these hold and which do not."""
    given, rules = dict(kv or {}), find_rules(engine)
    used: dict[str, object] = {}
    left_out = []
    for key, value in package.manifest.kv.items():
        forgets = policy in scorer_names()
        beside_policy = (policy == "full" and key in BUDGETS) or (forgets and key == "scorer")
        beside_policy |= not forgets and key in OF_FORGETTING
        beside_policy |= policy != "auto" and key in OF_ARCHIVE
        if key in given:
            continue
        if beside_policy or not rules.knows(key, value) or not _is_valid(key, value, rules.storages):
            left_out.append(f"{key}={value}")
        else:
            used[key] = value
    if used:
        listed = ", ".join(f"{key}={value}" for key, value in used.items())
        notice(f"settings of the model's file: {listed} (--kv overrides them)")
    if left_out:
        notice(f"settings of the model's file that do not apply here: {', '.join(left_out)}")
    return {**used, **given}


def _is_valid(key: str, value: object, storages: tuple[str, ...]) -> bool:
    """Whether it is one of ours by itself; what does not go together is found when all of them are checked."""
    smallest = {"sinks": 0, "window": 1} if key == "hot_tokens" else {}
    try:
        CacheSettings.parse({**smallest, key: value}, storages=storages)
    except OptionError:
        return False
    return True
