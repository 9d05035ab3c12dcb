"""What the leaderboard compares: whatever the registries have, as settings of `load`. A new kind is a row of `KINDS`.

A method is named by its settings, as ``--methods`` takes it: the policy, then ``+key=value``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from ....cache.codecs import codec_names
from ....cache.head_budgets import HEAD_BUDGETS, UNIFORM
from ....cache.head_profiles import profile_names
from ....cache.lowrank import lowrank_names
from ....cache.mergers import find_merger, merger_names
from ....cache.retrievers import retriever_names
from ....cache.scorers import find_scorer, scorer_names
from ....cache.scorers.recency import Recency
from ....cache.settings import CacheSettings
from ....errors import OptionError
from ...memory import CODECS_OF_CHOICE, RETRIEVERS_OF_CHOICE
from ...model import ANSWER_ROOM
from ..sides import FULL, KV_TYPES, PEER, Side

AUTO = "auto"
USUAL = CacheSettings()
DEFAULT_BUDGETS = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 16))  # in the order in which they are measured

# Of a budget's tokens. The usual sinks and window (320) would leave the scorer 192 of 512 tokens, and nothing of 256:
# with these it decides about five sixths, and lost needles came back (docs/lab-notes.md, heads that foretell).
SINKS, WINDOW_SHARE = 16, Fraction(1, 8)
# What recall leaves of its budget for scored pairs: digests, the chunk being read and what waits to be archived take
# the rest, by the planner's count at 4K tokens and 1/8 with the usual retriever.
SCORED_SHARE = Fraction(3, 8)


@dataclass(frozen=True)
class Budget:
    """``share`` of the KV cache that f16 would fill: ``tokens`` of a text of the whole context, ``kv_bytes`` of what a
    plan for it makes room for, with questions and answers."""

    share: Fraction
    tokens: int
    kv_bytes: int

    @classmethod
    def of(cls, share: Fraction, context: int, kv_bytes_per_token: int) -> Budget:
        """``context`` in tokens."""
        planned = (context + ANSWER_ROOM) * kv_bytes_per_token
        return cls(share, max(int(context * share), 1), int(planned * share))

    @property
    def pinned(self) -> dict[str, int]:
        """Sinks and window of every method that a scorer decides for, the same for all."""
        sinks = min(SINKS, self.tokens // 4)
        return {"sinks": sinks, "window": max(int(self.tokens * WINDOW_SHARE), 1)}


@dataclass(frozen=True)
class Method:
    """``policy`` and ``kv`` as of `load`, without the budget; or llama.cpp's ``kv_type``."""

    policy: str = ""
    kv: Mapping[str, str] = field(default_factory=dict)
    kv_type: str = ""

    @property
    def name(self) -> str:
        if self.kv_type:
            return f"{PEER}:{self.kv_type}"
        return "+".join([self.policy, *(f"{key}={value}" for key, value in self.kv.items())])

    @property
    def has_budget(self) -> bool:
        """Others hold what they hold, and are measured once."""
        return not self.kv_type and self.policy != FULL

    @property
    def recalls(self) -> bool:
        return self.policy == AUTO

    def side(self, budget: Budget | None, memory: str | int | None = None) -> Side:
        """As an evaluation takes it."""
        if self.kv_type:
            return Side(self.name, kv_type=self.kv_type)
        if budget is None:
            return Side(self.name, self.policy, dict(self.kv), None if self.name == FULL else memory)
        kv: dict[str, object] = {**self.kv}
        if not self.recalls:
            kv |= {"hot_tokens": budget.tokens, **budget.pinned}
        elif "scorer" in self.kv:
            hot = max(int(budget.tokens * SCORED_SHARE), sum(budget.pinned.values()) + 1)
            kv |= {"budget_bytes": budget.kv_bytes, "hot_tokens": hot, **budget.pinned}
        elif "heads" in self.kv:  # of the budget, streaming heads take sinks and window whatever the plan is
            kv |= {"budget_bytes": budget.kv_bytes, **budget.pinned}
        else:
            kv |= {"budget_bytes": budget.kv_bytes}
        return Side(f"{self.name} {budget.share}", self.policy, kv, memory)


def _auto() -> Iterable[Method]:
    """What the planner does when it is told nothing but the budget."""
    yield Method(AUTO)


def _scorers() -> Iterable[Method]:
    yield from map(Method, scorer_names())


def _head_budgets() -> Iterable[Method]:
    """With the usual scorer, and with those whose scores were made to be compared between heads."""
    scorers = [USUAL.scorer, *filter(_compares_heads, scorer_names())]
    for name in HEAD_BUDGETS:
        if name != UNIFORM:
            yield from (Method(scorer, {"head_budgets": name}) for scorer in scorers)


def _compares_heads(scorer: str) -> bool:
    found = find_scorer(scorer)
    return found.needs_retention or found.ranks_after_reading


def _mergers() -> Iterable[Method]:
    for name in merger_names():
        scorer = Recency.name if find_merger(name).chooses else USUAL.scorer
        yield Method(scorer, {"merge": name})


def _lowranks() -> Iterable[Method]:
    yield from (Method(AUTO, {"lowrank": name}) for name in lowrank_names())


def _head_profiles() -> Iterable[Method]:
    yield from (Method(AUTO, {"heads": name}) for name in profile_names())


def _retrievers() -> Iterable[Method]:
    """But the planner's first choice: where there is room for it, it is `_auto`."""
    yield from (Method(AUTO, {"retriever": name}) for name in retriever_names() if name != RETRIEVERS_OF_CHOICE[0])


def _codecs() -> Iterable[Method]:
    """But the planner's first choice: where that can be had at all, it is `_auto`."""
    yield from (Method(AUTO, {"codec": name}) for name in codec_names() if name != CODECS_OF_CHOICE[0])


def _scorers_with_recall() -> Iterable[Method]:
    """Scored pairs stay hot beside sinks and window; the others are recalled."""
    yield from (Method(AUTO, {"scorer": name}) for name in scorer_names())


def _whole() -> Iterable[Method]:
    """Whom all are compared with."""
    yield Method(FULL)


def _peers() -> Iterable[Method]:
    """llama.cpp with each type of its KV cache, f16 as the reference of the others."""
    yield from (Method(kv_type=name) for name in KV_TYPES)


KINDS: Sequence[Callable[[], Iterable[Method]]] = (
    _whole, _auto, _scorers, _head_budgets, _mergers, _retrievers, _scorers_with_recall, _codecs,
    _lowranks, _head_profiles, _peers,
)  # fmt: skip


def all_methods() -> tuple[Method, ...]:
    """Every method there is, in the order in which they are measured: settings that exclude each other are none."""
    return tuple(method for kind in KINDS for method in kind() if _can_be(method))


def _can_be(method: Method) -> bool:
    try:
        method.side(None).check(1)
    except OptionError:
        return False
    return True


def find_methods(names: Sequence[str]) -> tuple[Method, ...]:
    """Those methods (all for no names), with the references that they need. Raises OptionError."""
    methods = all_methods()
    known = [method.name for method in methods]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise OptionError(f"method {unknown[0]!r} is not known; choose from {', '.join(known)}")
    wanted = {FULL, *(names or known)}
    wanted |= {method.side(None).reference for method in methods if method.name in wanted}
    return tuple(method for method in methods if method.name in wanted)


def parse_budgets(text: str) -> tuple[Fraction, ...]:
    """Shares such as ``1/8,1/4`` or ``0.125``, each once, in their order. Raises OptionError."""
    found = []
    for part in text.split(","):
        try:
            share = Fraction(part.strip())
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not 0 < share < 1:
            raise OptionError(
                f"budget {part.strip()!r} is not a share of the full cache between 0 and 1; give such as 1/8,1/4"
            )
        found.append(share)
    return tuple(dict.fromkeys(found))
