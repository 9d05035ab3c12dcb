"""What a person may set about the KV cache (``--kv key=value``, ``load(kv={...})``), checked once, here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..errors import OptionError
from .scorers import scorer_names

STORAGES = ("bf16", "fp32")
LARGEST_TOKENS = 1 << 31


@dataclass(frozen=True)
class CacheSettings:
    """None means that the planner chooses.

    ``hot_tokens``: tokens kept per KV head between chunks; ``chunk``: tokens read at a time; ``sinks`` first and
    ``window`` most recent tokens are always kept; ``scorer`` ranks the others; ``storage``: of the hot tier.
    """

    hot_tokens: int | None = None
    chunk: int | None = None
    sinks: int = 64
    window: int = 256
    scorer: str = "snapkv"
    storage: str = "bf16"

    def __post_init__(self) -> None:
        if self.scorer not in scorer_names():
            raise OptionError(f"kv scorer={self.scorer!r} is not known; choose one of {', '.join(scorer_names())}")
        if self.storage not in STORAGES:
            raise OptionError(f"kv storage={self.storage!r} is not supported; choose one of {', '.join(STORAGES)}")
        if self.hot_tokens is not None and self.hot_tokens < self.least_hot_tokens:
            raise OptionError(
                f"kv hot_tokens={self.hot_tokens} cannot hold sinks + window = {self.least_hot_tokens} tokens; "
                "raise hot_tokens or lower sinks or window"
            )

    @property
    def least_hot_tokens(self) -> int:
        """The fewest tokens that a budget can keep: what is never given up."""
        return self.sinks + self.window

    @classmethod
    def parse(cls, values: Mapping[str, object] | None) -> CacheSettings:
        """Settings from a mapping of names to numbers or their text.

        Raises:
            OptionError: an unknown key or a value that is not supported.
        """
        known = {field.name for field in fields(cls)}
        parsed: dict[str, int | str] = {}
        for key, value in (values or {}).items():
            if key not in known:
                raise OptionError(f"kv setting {key!r} is not known; known are {', '.join(sorted(known))}")
            parsed[key] = str(value) if key in ("scorer", "storage") else _count(key, value)
        return cls(**parsed)  # type: ignore[arg-type]


def _count(key: str, value: object) -> int:
    least = 0 if key == "sinks" else 1
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if not least <= number < LARGEST_TOKENS:
        raise OptionError(f"kv {key}={value!r} is not a number of tokens; give a whole number, {least} or more")
    return number
