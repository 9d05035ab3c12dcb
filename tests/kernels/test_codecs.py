"""Codecs against their NumPy twin: the same bytes, and the same numbers back in every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.kernels import NativeCodec, reference_codecs

Array = NDArray[Any]
BLOCK = kernels.BLOCK_TOKENS
SIZES = (16, 64, 80, 128)
FORMS = {
    "f16": (16, 16, False, 0),
    "q8": (8, 8, False, 0),
    "q4": (4, 4, False, 0),
    "q3": (3, 3, False, 0),
    "q2": (2, 2, False, 0),
    "q4 outliers": (4, 4, False, 3),
    "q8 outliers": (8, 8, False, 17),
    "uneven 4": (4, 4, True, 11),
    "uneven 3": (3, 3, True, 11),
    "uneven 2": (2, 2, True, 11),
    "uneven 2, no outliers": (2, 2, True, 0),
    "keys 4, values 2": (4, 2, True, 1),
    "keys 8, values 3": (8, 3, True, 2),
    "keys 16, values 4": (16, 4, False, 2),
    "keys 2, values 16": (2, 16, False, 128),
}
GROUPED = {
    "grouped 8": (8, 8),
    "grouped 4": (4, 4),
    "grouped 3": (3, 3),
    "grouped 2": (2, 2),
    "grouped 16, 3": (16, 3),
    "grouped 4, 16": (4, 16),
}
ALL = (*FORMS, *GROUPED)
HOSTILE_FORMS = ("f16", "q8 outliers", "q3", "q4 outliers", "uneven 4", "uneven 2", "grouped 8", "grouped 2")


@pytest.fixture(params=kernels.variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn; the one that was active comes back."""
    before = kernels.active_variant()
    kernels.select_variant(request.param)
    yield request.param
    kernels.select_variant(before)


@pytest.fixture
def every_variant() -> Iterator[Sequence[str]]:
    """For a test that goes through them by itself, because the twin takes longest."""
    before = kernels.active_variant()
    yield kernels.variants()
    kernels.select_variant(before)


def make_codec(form: str) -> NativeCodec:
    if form in GROUPED:
        keys, values = GROUPED[form]
        return NativeCodec(key_bits=keys, value_bits=values, grouped=True)
    keys, values, nonuniform, outliers = FORMS[form]
    return NativeCodec(key_bits=keys, value_bits=values, nonuniform=nonuniform, outliers=outliers)


@dataclass(frozen=True)
class Case:
    """Pairs [T, D] of one head, their codec, and the statistics found in ``sample`` pairs of the same kind."""

    codec: NativeCodec
    keys: Array
    values: Array
    statistics: kernels.HeadStatistics

    @property
    def head_size(self) -> int:
        return int(self.keys.shape[1])

    def encode(self) -> Array:
        return kernels.encode_blocks(self.codec, self.statistics, self.keys, self.values)

    def decode(self, blocks: Array) -> tuple[Array, Array]:
        """Keys and values [T, D]."""
        keys, values = kernels.decode_blocks(self.codec, self.statistics, self.head_size, blocks)
        assert keys.dtype == values.dtype == np.float32
        return keys.swapaxes(1, 2).reshape(-1, self.head_size), values.reshape(-1, self.head_size)

    def sides(self) -> tuple[reference_codecs.Side, reference_codecs.Side]:
        """The twin's, with the native statistics."""
        c, s = self.codec, self.statistics
        return (
            reference_codecs.Side(
                c.key_bits, c.outliers, s.key_center, s.key_spread, levels(s.key_levels), True, c.grouped
            ),
            reference_codecs.Side(
                c.value_bits, c.outliers, s.value_center, s.value_spread, levels(s.value_levels), False, c.grouped
            ),
        )

    def twin_bytes(self) -> Array:
        blocks = range(0, len(self.keys), BLOCK)
        sides = self.sides()
        with np.errstate(over="ignore"):
            return np.stack([
                reference_codecs.encode_block(*sides, self.keys[t : t + BLOCK], self.values[t : t + BLOCK])
                for t in blocks
            ])  # fmt: skip

    def twin_pairs(self, blocks: Array) -> tuple[Array, Array]:
        parts = [reference_codecs.decode_block(*self.sides(), self.head_size, block) for block in blocks]
        return np.concatenate([keys for keys, _ in parts]), np.concatenate([values for _, values in parts])


def levels(found: Array) -> Array | None:
    return found if found.size else None


def pairs(head_size: int, tokens: int, seed: int = 0) -> tuple[Array, Array]:
    """Keys with centers far beyond their spread, values with heavy tails."""
    rng = np.random.default_rng(seed)
    shape = np.random.default_rng(99)  # of the channels: the same for a sample and what is encoded
    keys = rng.normal(size=(tokens, head_size)) * shape.uniform(0.2, 5.0, head_size) + shape.normal(size=head_size) * 20
    values = rng.standard_t(3, size=(tokens, head_size)) * 0.1
    return keys.astype(np.float32), values.astype(np.float32)


def make_case(form: str, head_size: int, tokens: int = 48, change: Callable[[Array], None] | None = None) -> Case:
    codec = make_codec(form)
    statistics = kernels.calibrate(codec, *pairs(head_size, 256, seed=1))
    keys, values = pairs(head_size, tokens)
    if change is not None:
        change(keys)
        change(values)
    return Case(codec, keys, values, statistics)


def check_bytes(got: Array, expected: Array) -> None:
    assert got.shape == expected.shape
    differ = np.flatnonzero((got != expected).any(axis=0))
    assert differ.size == 0, f"bytes differ at {differ[:8]} of a block"


def check_pairs(case: Case, got: tuple[Array, Array], expected: tuple[Array, Array]) -> None:
    """float32 arithmetic: center + spread * (scale * level) has three roundings, each of half an ulp of its result.

    The result is at most center + the product, and where they cancel the roundings are of the parts' size. The grouped
    form has five, and an offset of at most two spreads.
    """
    for numbers, twin, side in zip(got, expected, case.sides(), strict=True):
        assert numbers.shape == twin.shape
        parts = 0 if side.bits == 16 else 2 * np.abs(side.center) + 4 * side.grouped * side.spread
        allowed = (4 + 2 * side.grouped) * 2.0**-24 * (np.abs(twin) + parts) + 1e-38
        assert (np.abs(numbers - twin) <= allowed).all(), f"off by {np.abs(numbers - twin).max():.3g}"


# --- bytes and numbers


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("head_size", SIZES)
def test_bytes_equal_the_twin(form: str, head_size: int) -> None:
    case = make_case(form, head_size)
    blocks = case.encode()
    assert blocks.shape == (3, kernels.block_bytes(case.codec, head_size))
    assert blocks.shape[1] == reference_codecs.block_bytes(*case.sides(), head_size)
    assert blocks.shape[1] % 16 == 0
    check_bytes(blocks, case.twin_bytes())


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("head_size", SIZES)
def test_numbers_equal_the_twin(variant: str, form: str, head_size: int) -> None:
    case = make_case(form, head_size)
    blocks = case.encode()
    check_pairs(case, case.decode(blocks), case.twin_pairs(blocks))


@pytest.mark.parametrize("form", ALL)
def test_every_code_is_decoded(variant: str, form: str) -> None:
    """Random bytes where the codes are: each code in each lane."""
    case = make_case(form, 64, tokens=16 * 8)
    blocks = case.encode()
    first = blocks.shape[1] - 128 * (case.codec.key_bits + case.codec.value_bits)
    codes = np.random.default_rng(5).integers(0, 256, blocks[:, first - first % 16 :].shape, dtype=np.uint8)
    if 16 in (case.codec.key_bits, case.codec.value_bits):
        codes[:, 1::2] &= 0xFB  # no infinities among the halves
    blocks[:, first - first % 16 :] = codes
    blocks[:, :first] = case.encode()[:, :first]
    check_pairs(case, case.decode(blocks), case.twin_pairs(blocks))


# --- how far off what comes back may be


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_size", SIZES)
def test_error_is_bounded_by_the_bits(form: str, head_size: int) -> None:
    """Clipping is chosen where it makes a token's squared error smaller than that of no clipping, half a step each."""
    case = make_case(form, head_size)
    restored = case.decode(case.encode())
    for side, given, got in zip(case.sides(), (case.keys, case.values), restored, strict=True):
        if side.bits == 16:
            assert (np.abs(got - given) <= 2.0**-11 * np.abs(given) + 2.0**-25).all()
            continue
        for first in range(0, len(given), BLOCK):
            part = slice(first, first + BLOCK)
            normal = reference_codecs.normalise(side, given[part])
            indices = reference_codecs.outlier_indices(side, normal)
            rest = reference_codecs.without(side, normal, indices)
            apart = reference_codecs.without(side, np.ones_like(normal), indices) == 0
            errors = np.abs(got[part] - given[part])
            assert (errors[apart] <= 2.0**-11 * np.abs(given[part][apart])).all()
            steps = np.abs(rest).max(axis=1) / side.reach
            widest_gap = np.diff(side.all_levels).max() / 2
            rounding = 1 + 2.0**-10  # of the scale to a half: the outermost level may fall short by so much
            size = np.abs(side.center) * 2.0**-22 / side.spread  # of float32 around a center far away
            normal_errors = np.where(apart, 0, errors) / side.spread
            lengths = np.sqrt((normal_errors**2).mean(axis=1))
            assert (lengths <= steps * (widest_gap * rounding + side.reach * 2.0**-10) + size.max()).all()


@pytest.mark.parametrize("form", GROUPED)
@pytest.mark.parametrize("head_size", SIZES)
def test_error_of_groups_is_bounded(form: str, head_size: int) -> None:
    """Half a step of the scale that clips none of a channel's 16; scales are 2^0.4 apart, the widest 4 times."""
    case = make_case(form, head_size)
    restored = case.decode(case.encode())
    for side, given, got in zip(case.sides(), (case.keys, case.values), restored, strict=True):
        if side.bits == 16:
            continue
        for first in range(0, len(given), BLOCK):
            part = slice(first, first + BLOCK)
            normal = reference_codecs.normalise(side, given[part])
            offset = np.clip(np.floor((normal.max(0) + normal.min(0)) * 2 + 8), 0, 15) / 4 - 1.875
            largest = np.abs(normal - offset).max(axis=0)
            assert largest.max() < 32
            widest = np.where(largest > 8, 32, np.maximum(largest * 2**0.4, 0.165)) / side.reach
            half_step = widest / 2 if side.bits < 16 else 0
            size = np.abs(side.center) * 2.0**-22 / side.spread
            errors = np.sqrt((((got[part] - given[part]) / side.spread) ** 2).mean(axis=0))
            assert (errors <= half_step * 1.001 + size).all()


def test_more_bits_are_closer() -> None:
    def error(form: str) -> float:
        case = make_case(form, 64, tokens=160)
        return float(np.square(case.decode(case.encode())[0] - case.keys).mean())

    assert error("q8") < error("uneven 4") < error("q4") < error("uneven 3") < error("q3") < error("uneven 2")
    assert error("uneven 2") < error("uneven 2, no outliers") < error("q2") * 1.01


def test_a_large_value_is_kept_apart() -> None:
    """It comes back as a half and costs its token nothing."""

    def plant(x: Array) -> None:
        x[5, 3] = 4000.0

    for form in ("uneven 4", "q4 outliers"):
        case, plain = make_case(form, 64, change=plant), make_case(form, 64)
        got, without = (c.decode(c.encode())[1] for c in (case, plain))
        assert got[5, 3] == 4000.0
        others = np.arange(64) != 3
        errors = [np.square(x[5, others] - plain.values[5, others]).mean() for x in (got, without)]
        assert errors[0] <= 4 * errors[1]


# --- hostile values


def one_huge(x: Array) -> None:
    x[7, 2] = 1e38


def infinities(x: Array) -> None:
    x[0, 0], x[3, 5], x[20, 1] = np.inf, -np.inf, np.inf


def not_numbers(x: Array) -> None:
    x[2, 3], x[17] = np.nan, np.nan


def everything_bad(x: Array) -> None:
    x[:16] = np.nan
    x[16:24] = np.inf
    x[24:] = -3e38


HOSTILE: dict[str, Callable[[Array], None]] = {
    "zeros": lambda x: x.fill(0.0),
    "constant": lambda x: x.fill(7.5),
    "constant channel": lambda x: x[:, 4].fill(-300.0),
    "equal tokens": lambda x: np.copyto(x, x[0].copy()),
    "tiny": lambda x: np.multiply(x, 1e-40, out=x),
    "small": lambda x: np.multiply(x, 1e-7, out=x),
    "large": lambda x: np.multiply(x, 1e4, out=x),
    "one huge": one_huge,
    "infinities": infinities,
    "not numbers": not_numbers,
    "everything bad": everything_bad,
}


@pytest.mark.parametrize("form", HOSTILE_FORMS)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_pairs(every_variant: Sequence[str], form: str, hostile: str) -> None:
    """Finite numbers back, the twin's bytes, whether the statistics come from good pairs or from these."""
    case = make_case(form, 16, tokens=32, change=HOSTILE[hostile])
    own = kernels.calibrate(case.codec, case.keys, case.values)
    for statistics in (case.statistics, own):
        assert statistics.fit(case.codec, 16)
        now = Case(case.codec, case.keys, case.values, statistics)
        blocks = now.encode()
        check_bytes(blocks, now.twin_bytes())
        expected = now.twin_pairs(blocks)
        for name in every_variant:
            kernels.select_variant(name)
            restored = now.decode(blocks)
            assert all(np.isfinite(x).all() for x in restored)
            check_pairs(now, restored, expected)


@pytest.mark.parametrize("form", ALL)
def test_what_does_not_vary_comes_back(form: str) -> None:
    """A block that is everywhere the center is restored to half a step of the least spread."""
    keys = np.tile(np.linspace(-50, 50, 16, dtype=np.float32), (32, 1))
    codec = make_codec(form)
    case = Case(codec, keys, keys, kernels.calibrate(codec, keys, keys))
    for got in case.decode(case.encode()):
        np.testing.assert_allclose(got, keys, rtol=2.0**-11, atol=1e-4)


@pytest.mark.parametrize("form", ALL)
def test_blocks_know_nothing_of_each_other(form: str) -> None:
    case = make_case(form, 64)
    blocks = case.encode()
    for number in range(3):
        part = slice(number * BLOCK, (number + 1) * BLOCK)
        alone = Case(case.codec, case.keys[part], case.values[part], case.statistics)
        np.testing.assert_array_equal(alone.encode()[0], blocks[number])


@pytest.mark.parametrize("form", [form for form, (_, _, _, outliers) in FORMS.items() if outliers])
def test_outliers_that_lead_outside_are_passed_over(variant: str, form: str) -> None:
    """A block is data: it may come from a file that somebody made."""
    case = make_case(form, 16)
    keys, values = case.sides()
    blocks = case.encode()
    first = 32 * ((keys.bits < 16) + (values.bits < 16))
    last = first + 4 * case.codec.outliers * ((keys.bits < 16) + (values.bits < 16))
    blocks[:, first:last] = 0xFF
    for got in case.decode(blocks):
        assert np.isfinite(got).all()


@pytest.mark.parametrize("form", ALL)
def test_any_bytes_can_be_decoded(variant: str, form: str) -> None:
    case = make_case(form, 80)
    blocks = np.random.default_rng(2).integers(0, 256, (20, kernels.block_bytes(case.codec, 80)), dtype=np.uint8)
    assert case.decode(blocks)[0].shape == (320, 80)


# --- statistics


@pytest.mark.parametrize("form", [form for form in ALL if form != "f16"])
@pytest.mark.parametrize("tokens", [16, 17, 100])
def test_statistics_equal_the_twin(form: str, tokens: int) -> None:
    codec, given = make_codec(form), pairs(64, tokens)
    found = kernels.calibrate(codec, *given)
    assert found.fit(codec, 64)
    names = (("key", codec.key_bits, given[0], True), ("value", codec.value_bits, given[1], False))
    for name, bits, x, keys in names:
        if bits == 16:
            continue
        twin = reference_codecs.calibrate_side(
            bits, x, keys=keys, outliers=codec.outliers, nonuniform=codec.nonuniform
        )  # fmt: skip
        np.testing.assert_allclose(getattr(found, f"{name}_center"), twin.center, rtol=1e-6)
        np.testing.assert_allclose(getattr(found, f"{name}_spread"), twin.spread, rtol=1e-6)
        found_levels = levels(getattr(found, f"{name}_levels"))
        assert (found_levels is None) == (twin.levels is None)
        if found_levels is not None and twin.levels is not None:
            np.testing.assert_allclose(found_levels, twin.levels, atol=1e-5)


def test_the_same_sample_gives_the_same_statistics() -> None:
    codec, given = make_codec("uneven 4"), pairs(64, 512)
    first, second = kernels.calibrate(codec, *given), kernels.calibrate(codec, *given)
    for name in ("key_center", "key_spread", "key_levels", "value_center", "value_spread", "value_levels"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("form", ["uneven 4", "uneven 3", "uneven 2"])
def test_levels_ascend_and_no_spread_is_zero(form: str) -> None:
    keys, values = pairs(64, 128)
    keys[:, 5], values[:] = 3.0, 0.0
    found = kernels.calibrate(make_codec(form), keys, values)
    assert (np.diff(found.key_levels) > 0).all()
    assert (found.key_spread > 0).all()
    assert (found.value_spread > 0).all()


def statistics_with(**changes: Any) -> kernels.HeadStatistics:
    good = kernels.calibrate(make_codec("uneven 2"), *pairs(16, 64))
    names = ("key_center", "key_spread", "value_center", "value_spread", "key_levels", "value_levels")
    return kernels.HeadStatistics(**{name: changes.get(name, getattr(good, name)) for name in names})


@pytest.mark.parametrize(
    "changes",
    [
        {"key_center": np.zeros(15, np.float32)},
        {"key_center": np.full(16, np.nan, np.float32)},
        {"value_center": np.full(16, np.inf, np.float32)},
        {"key_spread": np.zeros(16, np.float32)},
        {"value_spread": np.full(16, -1, np.float32)},
        {"value_spread": np.full(16, np.inf, np.float32)},
        {"key_levels": np.zeros(0, np.float32)},
        {"key_levels": np.array([-1, 0, 1], np.float32)},
        {"value_levels": np.array([-1, 1, 0, 2], np.float32)},
        {"value_levels": np.array([-1, 0, np.nan, 2], np.float32)},
    ],
)
def test_statistics_that_do_not_fit(changes: dict[str, Array]) -> None:
    codec = make_codec("uneven 2")
    assert statistics_with().fit(codec, 16)
    assert not statistics_with(**changes).fit(codec, 16)
    with pytest.raises(ValueError, match="not of this codec and head size"):
        kernels.encode_blocks(codec, statistics_with(**changes), *pairs(16, 16))


# --- refusals


@pytest.mark.parametrize(
    "changes",
    [{"key_bits": 5}, {"value_bits": 1}, {"value_bits": 32}, {"outliers": -1}, {"outliers": 129},
     {"nonuniform": True, "key_bits": 8, "value_bits": 8}, {"grouped": True, "outliers": 1},
     {"grouped": True, "nonuniform": True}, {"grouped": True, "key_bits": 16, "value_bits": 16}],
)  # fmt: skip
def test_codecs_that_do_not_exist(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no codec has"):
        NativeCodec(**{"key_bits": 4, "value_bits": 4, **changes})


def test_refused_shapes() -> None:
    codec = make_codec("q4")
    good = kernels.calibrate(codec, *pairs(64, 16))
    with pytest.raises(ValueError, match="16 tokens or more"):
        kernels.calibrate(codec, *pairs(64, 15))
    with pytest.raises(ValueError, match="multiple of 16"):
        kernels.calibrate(codec, *pairs(24, 16))
    with pytest.raises(ValueError, match="multiple of 16"):
        kernels.block_bytes(codec, 272)
    with pytest.raises(ValueError, match="whole blocks"):
        kernels.encode_blocks(codec, good, *pairs(64, 17))
    with pytest.raises(ValueError, match="both be"):
        kernels.encode_blocks(codec, good, pairs(64, 16)[0], pairs(64, 32)[1])
    with pytest.raises(ValueError, match="not of this codec"):
        kernels.encode_blocks(codec, good, *pairs(32, 16))
    with pytest.raises(ValueError, match="block_bytes"):
        kernels.decode_blocks(codec, good, 64, np.zeros((1, 17), np.uint8))
    assert kernels.encode_blocks(codec, good, *pairs(64, 0)).shape == (0, kernels.block_bytes(codec, 64))


# --- the tester


@pytest.mark.parametrize("form", ALL)
def test_a_wrong_byte_is_noticed(form: str) -> None:
    """A sample of the bytes; each changes the numbers, except for codes below an outlier."""
    case = make_case(form, 64, tokens=16)
    blocks, expected = case.encode(), case.twin_bytes()
    keys, values = case.sides()
    used = sum(keys.bytes(64)) + sum(values.bytes(64))
    for place in {*range(0, used, 149), used - 1}:
        wrong = blocks.copy()
        wrong[0, place] ^= 0x12
        with pytest.raises(AssertionError, match="bytes differ"):
            check_bytes(wrong, expected)
        if case.codec.outliers and place >= used - 128 * (keys.bits + values.bits):
            continue
        with pytest.raises(AssertionError, match="off by"):
            check_pairs(case, case.decode(wrong), case.twin_pairs(blocks))
