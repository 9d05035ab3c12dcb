"""How a model is used: what a person sets (`load`, the command line), checked once, here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..cache import CacheSettings
from ..cache.head_profiles import ALL, find_profile, ranked_profiles
from ..cache.lowrank import CSKV, NO_LOWRANK
from ..cache.mergers import NONE, find_merger
from ..cache.scorers import find_scorer, scorer_names
from ..cache.scorers.recency import Recency
from ..cache.settings import OF_ARCHIVE
from ..devices.machine import cores_usable, default_memory_limit
from ..devices.planner import Wishes
from ..devices.sizes import parse_size
from ..errors import OptionError
from .engines import find_device
from .engines.rules import NATIVE, find_rules

NAMED_POLICY_HOT_TOKENS = 2048  # of a policy asked for by name, without a budget of its own


@dataclass(frozen=True)
class Options:
    """How a model is used, checked."""

    memory_bytes: int
    policy: str
    settings: CacheSettings
    threads: int
    disk_bytes: int | None = None  # what may be written beside models; None: a share of what is free
    given: frozenset[str] = frozenset()  # keys of the settings that a person set: the planner leaves these alone
    device: str = "cpu"
    engine: str = NATIVE

    @classmethod
    def check(
        cls,
        memory: str | int | None,
        policy: str,
        kv: Mapping[str, object] | None,
        threads: int | None,
        device: str,
        disk: str | int | None = None,
        engine: str = NATIVE,
    ) -> Options:
        """Raises OptionError for anything unknown or out of range."""
        find_device(device)
        if threads is not None and not 1 <= threads <= 1024:
            raise OptionError(f"threads is {threads}; give a number from 1 to 1024")
        rules = find_rules(engine)
        settings = CacheSettings.parse(kv, storages=rules.storages)
        if rules.default_scorer is not None and "scorer" not in (kv or {}):
            settings = replace(settings, scorer=rules.default_scorer)
        scorer = settings.scorer
        if policy in scorer_names():
            hot = settings.hot_tokens or (NAMED_POLICY_HOT_TOKENS if settings.budget_bytes is None else None)
            settings = replace(settings, scorer=policy, hot_tokens=hot)
        elif policy not in ("auto", "full"):
            known = ", ".join(("auto", "full", *scorer_names()))
            raise OptionError(f"policy {policy!r} is not known; choose one of {known}")
        given = frozenset(kv or ())
        for contradiction in _contradictions(policy, settings, given, scorer):
            raise OptionError(contradiction)
        rules.check(kv or (), settings.scorer, disk=disk is not None)
        limit = default_memory_limit() if memory is None else parse_size(memory)
        disk_bytes = None if disk is None else parse_size(disk)
        return cls(limit, policy, settings, threads or cores_usable(), disk_bytes, given, device, engine)

    @property
    def recalls(self) -> bool:
        """Whether what leaves the hot tier is kept and recalled; a scorer's name asks for a budget that forgets."""
        return self.policy == "auto"

    @property
    def compiles(self) -> bool:
        """Whether a text is read whole, and what is forgotten of it is chosen then."""
        return self.policy in scorer_names() and find_scorer(self.policy).ranks_after_reading

    @property
    def wishes(self) -> Wishes:
        """What the planner must keep to."""
        settings = self.settings
        return Wishes(
            hot_tokens=settings.hot_tokens,
            chunk=settings.chunk,
            sinks=settings.sinks if "sinks" in self.given else None,
            window=settings.window if "window" in self.given else None,
            recall_tokens=0 if settings.retriever == "none" else settings.recall_tokens,
            budget_bytes=settings.budget_bytes,
        )


def _contradictions(policy: str, settings: CacheSettings, given: frozenset[str], scorer: str) -> Iterator[str]:
    """What of the settings makes no sense with the others or the policy, and what to do about it.

    ``given``: the keys that a person has set; ``scorer``: as set there, whatever the policy made of it.
    """
    if policy == "full" and settings.hot_tokens is not None:
        yield "policy full keeps every token: leave out kv hot_tokens, or use policy auto"
    if policy == "full" and settings.budget_bytes is not None:
        yield "policy full keeps every token: leave out kv budget_bytes, or use policy auto"
    for key, value in settings.of_forgetting.items() if policy not in scorer_names() else ():
        yield (
            f"kv {key}={value} is for a budget that forgets, which policy {policy} has not; leave it out or use a "
            "scorer's name as the policy"
        )
    if policy not in scorer_names() and find_scorer(settings.scorer).ranks_after_reading:
        yield (
            f"kv scorer={settings.scorer} ranks texts that were read whole, which policy {policy} does not wait "
            f"for; use policy {settings.scorer}"
        )
    if settings.merge != NONE and find_merger(settings.merge).chooses and policy != Recency.name:
        yield (
            f"kv merge={settings.merge} chooses itself what stays between sinks and window, where policy {policy} "
            f"would have no say; use policy {Recency.name}"
        )
    if settings.heads != ALL and find_scorer(settings.scorer).ranks_after_reading:
        yield (
            f"policy {policy} compiles what all heads have seen, and with heads={settings.heads} some see a window "
            "only; leave out heads, or use another policy"
        )
    if "streaming_heads" in given and (settings.heads == ALL or not find_profile(settings.heads).calibrated):
        yield (
            f"kv streaming_heads is for a head profile that ranks heads, which heads={settings.heads} does not; "
            f"leave it out or set heads to one of {', '.join(ranked_profiles())}"
        )
    for key in OF_ARCHIVE if policy != "auto" else ():
        if key in given and (key, getattr(settings, key)) != ("lowrank", NO_LOWRANK):
            yield (
                f"kv {key}={getattr(settings, key)} is for what policy auto archives, and policy {policy} archives "
                "nothing; leave it out or use policy auto"
            )
    if "scorer" in given and policy in scorer_names() and scorer != policy:
        yield f"policy {policy} is a scorer, and kv scorer={scorer} another; leave out one of them"
    if settings.low_rank is None and "rank" in given:
        yield f"kv rank={settings.rank} is of kv lowrank, which is none; set kv lowrank, too, or leave it out"
    if settings.lowrank == CSKV and settings.heads != ALL:
        yield (
            f"kv lowrank={settings.lowrank} has a basis for all KV heads, which heads={settings.heads} does not "
            "archive; leave one of them out"
        )
