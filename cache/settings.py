"""What a person may set about the KV cache (``--kv key=value``, ``load(kv={...})``), checked once, here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from ..devices.sizes import parse_size
from ..errors import OptionError
from .codecs import codec_names
from .head_budgets import HEAD_BUDGETS, UNIFORM
from .head_profiles import ALL, profile_names
from .lowrank import DEFAULT_PERCENT, LOWRANKS, NO_LOWRANK, LowRank
from .mergers import NONE, merger_names
from .retrievers import retriever_names
from .scorers import scorer_names

STORAGES = ("bf16", "fp32")
GGML_STORAGES = ("f16", "q8_0", "q4_0")  # of the engine llama.cpp
ALL_STORAGES = (*STORAGES, *GGML_STORAGES)
LARGEST_TOKENS = 1 << 31
OF_HEADS = ("heads", "streaming_heads")
MOST_PERCENT = 100
OF_ARCHIVE = ("codec", "retriever", "recall_tokens", "recall_every", "reach", "lowrank", "rank")  # and of nothing else
OF_FORGETTING = {"head_budgets": UNIFORM, "merge": NONE}  # settings of a budget that forgets, as they are by themselves


@dataclass(frozen=True)
class CacheSettings:
    """None means that the planner chooses.

    ``hot_tokens``: tokens kept per KV head between chunks; ``chunk``: tokens read at a time; ``sinks`` first and
    ``window`` most recent tokens are always kept; ``scorer`` ranks the others; ``storage``: of the hot tier.
    ``budget_bytes`` bounds hot and warm pages, digests and recalled tokens together; ``codec`` encodes what leaves the
    hot tier; ``retriever`` finds ``recall_tokens`` of it per KV head again, for each chunk and every
    ``recall_every`` tokens of an answer, and nothing recalled is seen further back than ``reach`` tokens, or than it
    takes to lie side by side. ``head_budgets``: how the KV heads of a layer share a budget that forgets;
    ``merge``: what becomes of the pairs that it forgets. ``heads``: which KV heads see the whole text, by a head
    profile; the others hold ``sinks`` and ``window``, as they are here, in every tier. Where the profile ranks heads,
    ``streaming_heads`` percent are such. ``lowrank``: archived keys and values are ``rank`` percent of their channels.
    """

    hot_tokens: int | None = None
    chunk: int | None = None
    sinks: int = 64
    window: int = 256
    scorer: str = "snapkv"
    storage: str = "bf16"
    budget_bytes: int | None = None
    codec: str | None = None
    retriever: str | None = None
    recall_tokens: int | None = None
    recall_every: int = 1
    reach: int | None = None
    head_budgets: str = UNIFORM
    merge: str = NONE
    heads: str = ALL
    streaming_heads: int = 50
    lowrank: str = NO_LOWRANK
    rank: int = DEFAULT_PERCENT

    def __post_init__(self) -> None:
        known = {
            "scorer": scorer_names(), "codec": codec_names(), "retriever": retriever_names(),
            "head_budgets": HEAD_BUDGETS, "merge": (NONE, *merger_names()),
            "heads": (ALL, *profile_names()), "lowrank": LOWRANKS,
        }  # fmt: skip
        for key, names in known.items():
            value = getattr(self, key)
            if value is not None and value not in names:
                raise OptionError(f"kv {key}={value!r} is not known; choose one of {', '.join(names)}")
        if self.storage not in ALL_STORAGES:
            raise _unknown_storage(self.storage, STORAGES)
        if self.hot_tokens is not None and self.hot_tokens < self.least_hot_tokens:
            raise OptionError(
                f"kv hot_tokens={self.hot_tokens} cannot hold sinks + window = {self.least_hot_tokens} tokens; "
                "raise hot_tokens or lower sinks or window"
            )

    @property
    def least_hot_tokens(self) -> int:
        """The fewest tokens that a budget can keep: what is never given up."""
        return self.sinks + self.window

    @property
    def low_rank(self) -> LowRank | None:
        """How archived pairs are projected, without the basis; None: they are not."""
        return None if self.lowrank == NO_LOWRANK else LowRank(self.lowrank, self.rank)

    @property
    def of_forgetting(self) -> dict[str, str]:
        """What is set of `OF_FORGETTING`: nothing but a budget that forgets has a use for it."""
        return {key: getattr(self, key) for key, usual in OF_FORGETTING.items() if getattr(self, key) != usual}

    @classmethod
    def parse(cls, values: Mapping[str, object] | None, *, storages: Sequence[str] = STORAGES) -> CacheSettings:
        """Settings from a mapping of names to numbers or their text. ``storages``: those that the engine knows, its
        default first.

        Raises:
            OptionError: an unknown key or a value that is not supported.
        """
        known = {field.name for field in fields(cls)}
        parsed: dict[str, int | str] = {}
        for key, value in (values or {}).items():
            if key not in known:
                raise OptionError(f"kv setting {key!r} is not known; known are {', '.join(sorted(known))}")
            parsed[key] = _PARSERS.get(key, _count)(key, value)
        storage = str(parsed.setdefault("storage", storages[0]))
        if storage not in storages:
            raise _unknown_storage(storage, storages)
        return cls(**parsed)  # type: ignore[arg-type]


def _unknown_storage(storage: str, known: Sequence[str]) -> OptionError:
    return OptionError(f"kv storage={storage!r} is not supported; choose one of {', '.join(known)}")


def _count(key: str, value: object) -> int:
    least = 0 if key in ("sinks", "recall_tokens") else 1
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if number >= LARGEST_TOKENS:
        raise OptionError(f"kv {key}={str(value)[:20]} is too large; give less than {LARGEST_TOKENS}")
    if number < least:
        raise OptionError(f"kv {key}={value!r} is not a number of tokens; give a whole number, {least} or more")
    return number


def _percent(key: str, value: object) -> int:
    what, least = ("KV heads", 0) if key == "streaming_heads" else ("the channels", 1)
    text = str(value)
    if not text.isdecimal() or not least <= int(text) <= MOST_PERCENT:
        raise OptionError(f"kv {key}={value!r} is not a percentage of {what}; give {least} to {MOST_PERCENT}")
    return int(text)


def _name(key: str, value: object) -> str:  # noqa: ARG001
    return str(value)


def _size(key: str, value: object) -> int:
    try:
        return parse_size(value if isinstance(value, (int, str)) else str(value))
    except OptionError as error:
        raise OptionError(f"kv {key}: {error}") from None


_PARSERS: dict[str, Callable[[str, object], int | str]] = {
    "scorer": _name, "storage": _name, "codec": _name, "retriever": _name, "budget_bytes": _size,
    "head_budgets": _name, "merge": _name, "heads": _name, "streaming_heads": _percent, "lowrank": _name,
    "rank": _percent,
}  # fmt: skip
