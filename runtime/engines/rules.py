"""What each engine can be told: checked before anything is fetched, so that no setting is ever silently ignored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...cache.scorers import scorer_names
from ...cache.settings import GGML_STORAGES, OF_ARCHIVE, OF_FORGETTING, OF_HEADS, STORAGES
from ...errors import OptionError

NATIVE, LLAMA_CPP = "native", "llama.cpp"
_WHY = {
    "head_budgets": "which evicts a token of all KV heads together",
    "merge": "which evicts whole tokens",
    **dict.fromkeys(OF_HEADS, "whose KV heads hold the same tokens"),
}


@dataclass(frozen=True)
class EngineRules:
    """``storages`` and ``scorers``: those that it knows, its default first (None: that of the settings);
    ``unknown_kv``: settings that have no meaning for it; ``linked``: it runs .gguf files as they are.
    """

    name: str
    storages: tuple[str, ...]
    scorers: tuple[str, ...]
    default_scorer: str | None = None
    unknown_kv: frozenset[str] = frozenset()
    uses_disk: bool = True
    linked: bool = False

    def knows(self, key: str, value: object) -> bool:
        """Whether a setting of a model's file says anything to this engine."""
        known = {"storage": self.storages, "scorer": self.scorers}.get(key)
        return key not in self.unknown_kv and (known is None or str(value) in known)

    def check(self, keys: Iterable[str], scorer: str, *, disk: bool) -> None:
        """Raises OptionError for a setting that the engine has no use for."""
        for key in keys:
            if key in self.unknown_kv:
                raise OptionError(
                    f"kv {key} is not for --engine {self.name}, "
                    f"{_WHY.get(key, 'which keeps no archive to recall from')}; leave it out or use --engine {NATIVE}"
                )
        if scorer not in self.scorers:
            raise OptionError(
                f"{scorer} is not available with --engine {self.name}; choose one of {', '.join(self.scorers)}, or use "
                f"--engine {NATIVE}"
            )
        if disk and not self.uses_disk:
            raise OptionError(
                f"--disk is not for --engine {self.name}, whose KV cache is in memory; leave it out or use "
                f"--engine {NATIVE}"
            )


ENGINES = {
    NATIVE: EngineRules(NATIVE, STORAGES, scorer_names()),
    LLAMA_CPP: EngineRules(
        LLAMA_CPP,
        GGML_STORAGES,
        ("recency", "keydiff", "snapkv"),
        default_scorer="recency",  # costs nothing; the others watch every run
        unknown_kv=frozenset({*OF_ARCHIVE, *OF_FORGETTING, *OF_HEADS}),
        uses_disk=False,
        linked=True,
    ),
}


def find_rules(engine: str) -> EngineRules:
    """Raises OptionError for an engine that is not known."""
    if engine not in ENGINES:
        raise OptionError(f"engine {engine!r} is not known; choose {' or '.join(ENGINES)}")
    return ENGINES[engine]
