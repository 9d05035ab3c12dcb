"""What a person may set about the KV cache, and what they are told when it cannot be."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from satchel.cache import CacheSettings
from satchel.cache.codecs import codec_names
from satchel.cache.retrievers import retriever_names
from satchel.cache.scorers import scorer_names
from satchel.errors import OptionError


def test_defaults() -> None:
    for nothing in (None, {}):
        assert CacheSettings.parse(nothing) == CacheSettings()
    assert CacheSettings().scorer in scorer_names()
    assert CacheSettings().least_hot_tokens == CacheSettings().sinks + CacheSettings().window


def test_every_key_can_be_set_as_number_or_text() -> None:
    values = {"hot_tokens": 700, "chunk": 128, "sinks": 4, "window": 100, "scorer": "keydiff", "storage": "fp32",
              "budget_bytes": 12_000_000, "codec": "q4", "retriever": "minmax", "recall_tokens": 0,
              "recall_every": 1, "reach": 4096, "head_budgets": "adaptive", "merge": "lookm", "heads": "razor",
              "streaming_heads": 25, "lowrank": "cskv", "rank": 20}  # fmt: skip
    assert sorted(values) == sorted(field.name for field in fields(CacheSettings))
    expected = CacheSettings(**values)  # type: ignore[arg-type]
    assert CacheSettings.parse(values) == expected
    assert CacheSettings.parse({key: str(value) for key, value in values.items()}) == expected


@pytest.mark.parametrize("scorer", scorer_names())
def test_every_scorer_can_be_chosen(scorer: str) -> None:
    assert CacheSettings.parse({"scorer": scorer}).scorer == scorer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hot_token": 1}, "'hot_token' is not known; known are budget_bytes, chunk, codec, head_budgets, heads, "
                            "hot_tokens, lowrank, merge, rank, reach, recall_every, recall_tokens, retriever, scorer, "
                            "sinks, storage, streaming_heads, window"),
        ({"lowrank": "xkv"}, "lowrank='xkv' is not known; choose one of none, cskv, think"),
        ({"rank": 0}, "rank=0 is not a percentage of the channels; give 1 to 100"),
        ({"rank": 101}, "rank=101 is not a percentage"),
        ({"rank": "50%"}, "rank='50%' is not a percentage"),
        ({"Window": 1}, "'Window' is not known"),
        ({"": 1}, "'' is not known"),
        ({"scorer": "h3o"}, f"scorer='h3o' is not known; choose one of {', '.join(scorer_names())}"),
        ({"head_budgets": "even"}, "head_budgets='even' is not known; choose one of uniform, adaptive"),
        ({"merge": "mean"}, "merge='mean' is not known; choose one of none, lookm"),
        ({"codec": "q5"}, "codec='q5' is not known; choose one of f16, q8, q4, q2, grouped4"),
        ({"retriever": "Landmark"}, "retriever='Landmark' is not known; choose one of landmark, minmax, centroid"),
        ({"recall_tokens": -1}, "recall_tokens=-1 is not a number of tokens; give a whole number, 0 or more"),
        ({"recall_every": 0}, "recall_every=0 is not a number of tokens; give a whole number, 1 or more"),
        ({"budget_bytes": "12 apples"}, "kv budget_bytes: '12 apples' is not a size: write it like"),
        ({"budget_bytes": -1}, "kv budget_bytes: the size -1 is outside"),
        ({"budget_bytes": 1.5}, "kv budget_bytes: '1.5' is not a number of bytes"),
        ({"storage": "fp16"}, "storage='fp16' is not supported; choose one of bf16, fp32"),
        ({"storage": ""}, "storage='' is not supported"),
        ({"hot_tokens": 319}, "hot_tokens=319 cannot hold sinks . window = 320 tokens; raise hot_tokens or lower"),
        ({"hot_tokens": 100, "sinks": 1, "window": 100}, "window = 101"),
        ({"hot_tokens": 0}, "hot_tokens=0 is not a number of tokens; give a whole number, 1 or more"),
        ({"chunk": 0}, "chunk=0 is not a number of tokens"),
        ({"window": 0}, "window=0 is not a number of tokens"),
        ({"sinks": -1}, "sinks=-1 is not a number of tokens; give a whole number, 0 or more"),
        ({"chunk": "many"}, "chunk='many' is not"),
        ({"chunk": ""}, "chunk='' is not"),
        ({"chunk": 1.5}, "chunk=1.5 is not"),
        ({"chunk": True}, "chunk=True is not"),
        ({"chunk": None}, "chunk=None is not"),
        ({"chunk": float("nan")}, "chunk=nan is not"),
        ({"chunk": 1 << 31}, "chunk=2147483648 is too large; give less than 2147483648"),
        ({"chunk": "9" * 5000}, "is not a number of tokens"),
        ({"chunk": [1]}, "is not a number of tokens"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CacheSettings.parse(values)


def test_the_least_budget_is_allowed() -> None:
    assert CacheSettings.parse({"hot_tokens": 5, "sinks": 0, "window": 5}).least_hot_tokens == 5


@pytest.mark.parametrize("text", ["12MB", "12000KB", "12 mb", "12000000", 12_000_000])
def test_a_budget_is_a_size(text: str | int) -> None:
    assert CacheSettings.parse({"budget_bytes": text}).budget_bytes == 12_000_000


@pytest.mark.parametrize(("key", "names"), [("codec", codec_names()), ("retriever", (*retriever_names(), "none"))])
def test_every_name_can_be_chosen(key: str, names: tuple[str, ...]) -> None:
    for name in names:
        assert getattr(CacheSettings.parse({key: name}), key) == name
