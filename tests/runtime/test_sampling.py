"""Choosing tokens: options, filters, distributions, bad logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from satchel.errors import ModelError, OptionError
from satchel.runtime.sampling import Sampler, SamplingOptions

LOGITS = np.array([0.0, 3.0, 1.0, 2.0, -1.0], dtype=np.float32)


def draw(count: int = 4000, logits: np.ndarray[Any, Any] = LOGITS, **options: Any) -> np.ndarray[Any, Any]:
    sampler = Sampler(SamplingOptions(**{"temperature": 1.0, "seed": 7, **options}))
    return np.bincount([sampler.sample(logits) for _ in range(count)], minlength=logits.size) / count


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    assert Sampler().sample(LOGITS) == 1
    assert Sampler().sample(np.array([1.0, 2.0, 2.0], dtype=np.float32)) == 1
    assert Sampler(SamplingOptions(temperature=0.0, top_k=1, seed=3)).sample(LOGITS) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_chances_follow_the_softmax(temperature: float) -> None:
    expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    # four standard deviations of a share of 4,000 draws
    assert np.abs(draw(temperature=temperature) - expected).max() < 4 * 0.5 / math.sqrt(4000)


def test_a_tiny_temperature_is_greedy() -> None:
    assert draw(50, temperature=1e-300)[1] == 1


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.8}, {1, 3}),  # the shares are .64 .24 .09 .03 .01
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.3}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.01}, {1, 2, 3}),
    ],
)
def test_filters(options: dict[str, Any], kept: set[int]) -> None:
    assert set(np.flatnonzero(draw(3000, **options))) == kept


def test_top_k_keeps_no_more_than_k_of_equals() -> None:
    assert set(np.flatnonzero(draw(300, np.zeros(9, dtype=np.float32), top_k=2))) == {0, 1}


def test_masked_tokens_never_come() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], dtype=np.float32)
    assert set(np.flatnonzero(draw(300, logits))) == {1, 3}


def test_the_seed_decides() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=5.0, seed=seed))
        return [sampler.sample(LOGITS) for _ in range(64)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_repetition_penalty() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0))
    before = LOGITS.copy()
    assert sampler.sample(LOGITS, [1, 1, 1]) == 3  # 3 / 2 < 2, and once however often it was seen
    assert sampler.sample(LOGITS, []) == 1
    assert sampler.sample(LOGITS, [-1, 99, 1]) == 3  # ids outside the vocabulary are not looked at
    assert (before == LOGITS).all()
    negative = np.array([-1.0, -1.5], dtype=np.float32)
    assert sampler.sample(negative, [0]) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[4] = bad
    with pytest.raises(ModelError, match=f"computed {bad} instead of usable logits"):
        Sampler(SamplingOptions(temperature=temperature)).sample(logits)


@pytest.mark.parametrize(
    "logits", [np.full(3, -np.inf, np.float32), np.zeros(0, np.float32), np.zeros((2, 3), np.float32)]
)
def test_unusable_logits(logits: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ModelError, match="logits"):
        Sampler().sample(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, "1", None, True)),
        *(("top_k", value) for value in (-1, 1.5, "3", True)),
        *(("top_p", value) for value in (0.0, -1, 1.1, math.nan)),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
        *(("repetition_penalty", value) for value in (0, -1, math.inf, math.nan)),
        *(("seed", value) for value in (-1, 1.5, "x", True)),
    ],
)
def test_options_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{name} is .*, expected"):
        SamplingOptions(**{name: value})
