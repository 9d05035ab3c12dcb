"""Attention over the native cache in every instruction set, against the float64 reference.

The tolerances follow from the storage type: keys and values are rounded to ``unit`` (2^-24 for float32, 2^-8
for bfloat16, half a step of the last place), and sums of D or S numbers are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.kernels.reference import CacheReference

Array = NDArray[Any]
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-8}
PAGE = kernels.PAGE_TOKENS


@pytest.fixture(params=kernels.variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn; the one that was active comes back."""
    before = kernels.active_variant()
    kernels.select_variant(request.param)
    yield request.param
    kernels.select_variant(before)


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one layer's attention."""

    tokens: int = 70
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    rope_dims: int = 32
    attention_factor: float = 1.0
    scale: float = 0.2
    softcap: float = 0.0
    window: int = 0
    storage: str = "fp32"
    cache_threads: int = 1

    @property
    def frequencies(self) -> Array:
        half = self.rope_dims // 2
        return (1000.0 ** (-np.arange(half) / max(half, 1))).astype(np.float32)

    def inputs(self, seed: int = 0) -> tuple[Array, Array, Array]:
        """q, k, v [T, heads, D]: logits a few units wide, so that some keys matter much more than others."""
        rng = np.random.default_rng(seed)
        shape = (self.tokens, self.kv_heads, self.head_size)
        q = rng.normal(0, 1.5, (self.tokens, self.heads, self.head_size)).astype(np.float32)
        return q, rng.normal(0, 1.0, shape).astype(np.float32), rng.normal(0, 1.0, shape).astype(np.float32)

    def cache(self, layers: int = 1) -> kernels.KVCache:
        return kernels.KVCache(
            layers=layers, heads=self.heads, kv_heads=self.kv_heads, head_size=self.head_size,
            storage=self.storage, threads=self.cache_threads,
        )  # fmt: skip

    def twin(self) -> CacheReference:
        return CacheReference(1, self.kv_heads, self.head_size, self.frequencies, self.attention_factor)

    def attend(self, cache: kernels.KVCache, q: Array, k: Array, v: Array, places: Array, threads: int = 1) -> Array:
        return cache.attend(
            0, q, k, v, places, self.frequencies, scale=self.scale, softcap=self.softcap, window=self.window,
            attention_factor=self.attention_factor, threads=threads,
        )  # fmt: skip

    def expect(self, twin: CacheReference, q: Array, places: Array) -> Array:
        return twin.attention(0, q, places, scale=self.scale, softcap=self.softcap, window=self.window)[0]

    def tolerance(self, q: Array, k: Array, v: Array) -> float:
        """Largest error that rounding explains, from the sizes of q, k [S, K, D] and v.

        A logit is off by ``unit`` of each product's size (rounded keys) and by float32's share of a sum of D
        products and of the rotation; the rotation's angles are float32 times float32 positions in double, so
        exact. Softmax turns an absolute error e of the logits into at most 2e of the weights' total, which
        multiplies the spread of the values; the values' own rounding and the sums over S keys add to it.
        """
        unit = UNIT[self.storage]
        lengths = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
        logit_size = self.scale * lengths * self.attention_factor**2
        logits = logit_size * (unit + (self.head_size / 4 + 8) * UNIT["fp32"])
        spread = np.abs(v).max()
        sums = (len(k) / 8 + 16) * UNIT["fp32"] + 3e-7  # the exponential's own error
        return float(spread * (2 * logits + unit + sums))


def chunks(tokens: int, size: int) -> Iterator[slice]:
    for first in range(0, tokens, size):
        yield slice(first, min(first + size, tokens))


def run(case: Case, size: int, threads: int = 1, seed: int = 0) -> tuple[Array, Array]:
    """(native, reference) outputs of reading the case's tokens in chunks of ``size``."""
    q, k, v = case.inputs(seed)
    cache, twin, places = case.cache(), case.twin(), np.arange(case.tokens)
    got = []
    for part in chunks(case.tokens, size):
        got.append(case.attend(cache, q[part], k[part], v[part], places[part], threads))
        cache.commit()
    twin.append(0, k, v, places)
    cache.close()
    return np.concatenate(got), case.expect(twin, q, places)


def check(case: Case, got: Array, expected: Array, seed: int = 0) -> None:
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    error = np.abs(got - expected).max()
    allowed = case.tolerance(*case.inputs(seed))
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


# --- against the reference


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [*range(1, 18), PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1])
def test_lengths(variant: str, storage: str, tokens: int) -> None:
    case = Case(tokens=tokens, storage=storage)
    check(case, *run(case, tokens))


@pytest.mark.parametrize("size", [1, 7, 64, 100])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_chunks_equal_the_whole(variant: str, storage: str, size: int) -> None:
    case = Case(tokens=2 * PAGE + 2, storage=storage)
    got, expected = run(case, size)
    check(case, got, expected)
    whole, _ = run(case, case.tokens)
    # the same rounded pairs, only other orders of summation
    np.testing.assert_allclose(got, whole, atol=replace(case, storage="fp32").tolerance(*case.inputs()))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (2, 1), (4, 2), (7, 1), (14, 2)])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_groups_of_heads(variant: str, storage: str, heads: int, kv_heads: int) -> None:
    case = Case(tokens=67, heads=heads, kv_heads=kv_heads, storage=storage)
    check(case, *run(case, 20))


@pytest.mark.parametrize("head_size", [16, 48, 64, 128, 256])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_head_sizes(variant: str, storage: str, head_size: int) -> None:
    case = Case(head_size=head_size, rope_dims=head_size, scale=head_size**-0.5, storage=storage)
    check(case, *run(case, 33))


@pytest.mark.parametrize("window", [1, 2, 6, 7, 8, 15, 16, 17, 63, 64, 65, 129, 130, 131, 10_000])
@pytest.mark.parametrize("size", [1, 7, 64, 130])
def test_windows(variant: str, window: int, size: int) -> None:
    case = Case(tokens=130, window=window, head_size=16, rope_dims=16)
    check(case, *run(case, size))


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap(variant: str, softcap: float) -> None:
    case = Case(softcap=softcap, scale=1.0)
    check(case, *run(case, 30))


@pytest.mark.parametrize("rope_dims", [0, 2, 16, 30, 32])
@pytest.mark.parametrize("attention_factor", [1.0, 1.3])
def test_partial_rotation(variant: str, rope_dims: int, attention_factor: float) -> None:
    case = Case(rope_dims=rope_dims, attention_factor=attention_factor)
    check(case, *run(case, 30))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_flat_and_sharp_softmax(variant: str, scale: float) -> None:
    """At scale 30 logits reach thousands: no overflow, and nearly one key takes all."""
    case = Case(scale=scale)
    got, expected = run(case, 30)
    assert np.isfinite(got).all()
    if scale <= 1:
        check(case, got, expected)
    else:  # where float32 logits cannot tell two keys apart, either may win
        assert np.quantile(np.abs(got - expected), 0.9) < 1e-2


def test_positions_far_out_and_with_gaps(variant: str) -> None:
    case = Case(tokens=20)
    q, k, v = case.inputs()
    places = np.array([0, 5, 6, 100, 5000, 100_000, *range(1_000_000, 1_000_014)])
    cache, twin = case.cache(), case.twin()
    got = np.concatenate([case.attend(cache, q[part], k[part], v[part], places[part]) for part in chunks(20, 6)])
    twin.append(0, k, v, places)
    check(case, got, case.expect(twin, q, places))


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("window", [0, 40])
def test_heads_that_keep_different_tokens(variant: str, storage: str, window: int) -> None:
    """Each KV head keeps its own set, of another size, then the conversation goes on."""
    case = Case(tokens=150, storage=storage, window=window, cache_threads=4)
    q, k, v = case.inputs()
    places, cache, twin = np.arange(150), case.cache(), case.twin()
    first, rest = slice(0, 130), slice(130, 150)
    case.attend(cache, q[first], k[first], v[first], places[first])
    twin.append(0, k[first], v[first], places[first])
    for head, kept in enumerate([[0, 1, 2, 63, 64, 65, 100, 129], list(range(3, 130, 2))]):
        cache.retain(0, head, np.array(kept, np.int32))
        twin.retain(0, head, kept)
    got = case.attend(cache, q[rest], k[rest], v[rest], places[rest], threads=2)
    twin.append(0, k[rest], v[rest], places[rest])
    check(case, got, case.expect(twin, q[rest], places[rest]))


def test_a_head_that_forgot_everything(variant: str) -> None:
    case = Case(tokens=70)
    q, k, v = case.inputs()
    cache, twin, places = case.cache(), case.twin(), np.arange(70)
    case.attend(cache, q[:69], k[:69], v[:69], places[:69])
    twin.append(0, k[:69], v[:69], places[:69])
    cache.retain(0, 1, np.zeros(0, np.int32))
    twin.retain(0, 1, [])
    got = case.attend(cache, q[69:], k[69:], v[69:], places[69:])
    twin.append(0, k[69:], v[69:], places[69:])
    check(case, got, case.expect(twin, q[69:], places[69:]))
    np.testing.assert_allclose(got[0, 2:], np.repeat(v[69:, 1], 2, axis=0), rtol=1e-6)  # it sees itself alone


# --- what must not matter


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("size", [1, 7, 130])
def test_threads_of_a_call_change_nothing(variant: str, threads: int, size: int) -> None:
    case = Case(tokens=130, heads=14, head_size=16, rope_dims=16)
    np.testing.assert_array_equal(run(case, size, threads)[0], run(case, size)[0])


@pytest.mark.parametrize("cache_threads", [2, 4])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("window", [0, 70])
def test_keys_split_among_threads(variant: str, cache_threads: int, storage: str, window: int) -> None:
    """A decode step over many pages is split along the keys and merged."""
    case = Case(
        tokens=20 * PAGE + 5, kv_heads=1, head_size=16, rope_dims=16, scale=0.4, storage=storage, window=window,
        cache_threads=cache_threads,
    )  # fmt: skip
    q, k, v = case.inputs()
    cache, twin, places = case.cache(), case.twin(), np.arange(case.tokens)
    most = case.tokens - 3
    case.attend(cache, q[:most], k[:most], v[:most], places[:most])
    twin.append(0, k[:most], v[:most], places[:most])
    for step in range(most, case.tokens):
        part = slice(step, step + 1)
        got = case.attend(cache, q[part], k[part], v[part], places[part], threads=2)
        twin.append(0, k[part], v[part], places[part])
        check(case, got, case.expect(twin, q[part], places[part]))


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_instruction_sets_agree(storage: str) -> None:
    case = Case(tokens=130, head_size=64, rope_dims=64, storage=storage, softcap=20.0)
    before, outs = kernels.active_variant(), []
    try:
        for name in kernels.variants():
            kernels.select_variant(name)
            outs.append(run(case, 50)[0])
    finally:
        kernels.select_variant(before)
    allowed = replace(case, storage="fp32").tolerance(*case.inputs())
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], atol=allowed)


def test_layers_do_not_mix() -> None:
    case = Case(tokens=10)
    q, k, v = case.inputs()
    cache = case.cache(layers=2)
    alone = case.attend(cache, q, k, v, np.arange(10))
    other = cache.attend(1, q, k[::-1].copy(), v, np.arange(10), case.frequencies, scale=case.scale)
    assert np.abs(alone - other).max() > 0.1
    assert [cache.tokens(layer, 0) for layer in (0, 1)] == [10, 10]
    np.testing.assert_array_equal(case.attend(case.cache(), q, k, v, np.arange(10)), alone)


def test_settings_of_the_last_call_do_not_stick() -> None:
    """The rotation of the previous call is reused only where positions and frequencies are the same."""
    case = Case(tokens=4)
    q, k, v = case.inputs()
    for other in (replace(case, rope_dims=16), replace(case, attention_factor=2.0)):
        cache, places = case.cache(layers=2), np.arange(4)
        case.attend(cache, q, k, v, places)
        got = cache.attend(
            1, q, k, v, places, other.frequencies, scale=other.scale, attention_factor=other.attention_factor
        )
        twin = other.twin()
        twin.append(0, k, v, places)
        check(other, got, other.expect(twin, q, places))


# --- refusals


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([0, 1, -1], "out of range"),
        ([0, 1, 2**31 - 1], "out of range"),
        ([0, 1, 2**40], "out of range"),
        ([0, 2, 1], "must ascend"),
        ([0, 1], "wrong shape"),
    ],
)
def test_hostile_positions(places: Sequence[int], message: str) -> None:
    case = Case(tokens=3)
    cache = case.cache()
    with pytest.raises(ValueError, match=message):
        case.attend(cache, *case.inputs(), np.array(places, np.int64))
    assert cache.tokens(0, 0) == 0


def test_refused_positions_leave_no_trace_in_later_calls() -> None:
    """What was noted of a refused call must not pass for the rotation of the next one."""
    case = Case(tokens=2)
    q, k, v = case.inputs()
    cache, twin = case.cache(layers=2), case.twin()
    case.attend(cache, q, k, v, np.array([0, 6]))
    with pytest.raises(ValueError, match="must ascend"):
        cache.attend(1, q, k, v, np.array([5, 4]), case.frequencies, scale=case.scale)
    got = cache.attend(1, q, k, v, np.array([5, 6]), case.frequencies, scale=case.scale)
    twin.append(0, k, v, [5, 6])
    check(case, got, case.expect(twin, q, np.array([5, 6])))


def test_positions_before_those_already_held() -> None:
    """Pages are skipped by their first and last position: a chunk from the past is refused, or seen right."""
    case = Case(tokens=130)
    q, k, v = case.inputs()
    cache, twin = case.cache(), case.twin()
    case.attend(cache, q[:100], k[:100], v[:100], np.arange(100, 200))
    twin.append(0, k[:100], v[:100], np.arange(100, 200))
    try:
        got = case.attend(cache, q[100:], k[100:], v[100:], np.arange(30))
    except ValueError:
        return
    twin.append(0, k[100:], v[100:], np.arange(30))
    check(case, got, case.expect(twin, q[100:], np.arange(30)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 1}, "no such layer"),
        ({"layer": -1}, "no such layer"),
        ({"frequencies": np.zeros(17, np.float32)}, "rope_dims"),
        ({"q": np.zeros((3, 3, 32), np.float32)}, "wrong shape"),
        ({"q": np.zeros((2, 4, 32), np.float32)}, "wrong shape"),
        ({"q": np.zeros((3, 128), np.float32)}, "wrong shape"),
        ({"k": np.zeros((3, 2, 16), np.float32)}, "wrong shape"),
        ({"k": np.zeros((3, 4, 32), np.float32)}, "wrong shape"),
        ({"v": np.zeros((4, 2, 32), np.float32)}, "wrong shape"),
        ({"v": np.zeros((0, 2, 32), np.float32)}, "wrong shape"),
    ],
)
def test_hostile_shapes(change: dict[str, Any], message: str) -> None:
    case = Case(tokens=3)
    q, k, v = case.inputs()
    arguments: dict[str, Any] = {
        "layer": 0, "q": q, "k": k, "v": v, "positions": np.arange(3), "frequencies": case.frequencies,
        "scale": 1.0, **change,
    }  # fmt: skip
    cache = case.cache()
    with pytest.raises(ValueError, match=message):
        cache.attend(**arguments)
    assert cache.tokens(0, 0) == 0


def test_no_tokens() -> None:
    case = Case(tokens=0)
    cache = case.cache()
    assert case.attend(cache, *case.inputs(), np.zeros(0, np.int64)).shape == (0, 4, 32)
    assert cache.tokens(0, 0) == 0


# --- the tester


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "fault", ["sign", "nan", "position", "window", "head", "future", "lost page", "no factor", "value"]
)
def test_the_checker_notices(storage: str, fault: str) -> None:
    """Each planted fault is one that an off-by-one in the kernel would make."""
    case = Case(
        tokens=130, storage=storage, window=3 if fault == "window" else 65, attention_factor=1.2, scale=0.05
    )  # fmt: skip
    q, k, v = case.inputs()
    places = np.arange(130)
    got, expected = run(case, 130)
    check(case, got, expected)
    faulty, twin, at = case, case.twin(), places
    if fault == "window":
        faulty = replace(case, window=2)
    elif fault == "no factor":
        twin.attention_factor = 1.0
    elif fault == "future":
        at = places + 1
    keys, values = k.copy(), v.copy()
    if fault == "head":
        keys, values = keys[:, ::-1], values[:, ::-1]
    elif fault == "value":
        values[3, 1, 5] += 2.0
    twin.append(0, keys, values, places + (fault == "position") * (places > 64))
    if fault == "lost page":
        twin.retain(0, 1, [*range(64), 128, 129])
    wrong = faulty.expect(twin, q, at).astype(np.float32)
    if fault == "sign":
        wrong.flat[np.abs(wrong).argmax()] *= -1
    elif fault == "nan":
        wrong[0, 0, 0] = np.nan
    with pytest.raises(AssertionError, match="off by"):
        check(case, wrong, expected)
