"""Blocks of low rank against their NumPy twin: the same bytes, and the same numbers back in every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.kernels import NativeCodec, reference_codecs
from satchel.kernels.reference_codecs import LowRank, Side

Array = NDArray[Any]
BLOCK = kernels.BLOCK_TOKENS
LEAST_RANK = 4
FORMS: dict[str, dict[str, Any]] = {
    "f16": {"key_bits": 16, "value_bits": 16},
    "q8": {"key_bits": 8, "value_bits": 8},
    "q4": {"key_bits": 4, "value_bits": 4},
    "q3": {"key_bits": 3, "value_bits": 3},
    "grouped 4": {"key_bits": 4, "value_bits": 4, "grouped": True},
    "grouped 2": {"key_bits": 2, "value_bits": 2, "grouped": True},
    "uneven 2, outliers": {"key_bits": 2, "value_bits": 2, "nonuniform": True, "outliers": 5},
    "keys 16, values 4": {"key_bits": 16, "value_bits": 4},
}
# head size, key rank, value rank: one vector and several, whole tiles and remainders, no rest, one side only
SHAPES = [
    (16, 4, 4), (16, 16, 7), (16, 16, 16), (64, 32, 32), (64, 13, 13), (64, 0, 31), (80, 17, 0), (128, 64, 33),
    (256, 129, 256),
]  # fmt: skip


@pytest.fixture
def every_variant() -> Iterator[Sequence[str]]:
    """For a test that goes through all instruction sets of this machine by itself."""
    before = kernels.active_variant()
    yield kernels.variants()
    kernels.select_variant(before)


def projections(rng: np.random.Generator, heads: int, inputs: int) -> tuple[Array, Array]:
    """Encoders [1, heads, N, N] of all coefficients, and decoders that are not their transposes."""
    rows = np.stack([np.linalg.qr(rng.normal(size=(inputs, inputs)))[0] for _ in range(heads)])
    scale = rng.uniform(0.5, 2, (heads, 1, inputs))
    return (rows * scale).swapaxes(1, 2)[None].astype(np.float32), (rows / scale)[None].astype(np.float32)


def cut(encoders: Array, decoders: Array, ranks: Sequence[int]) -> dict[str, Array]:
    """As `kernels.LowRankBasis` takes them: of pairs, or of the side that has a rank."""
    borders = [ranks[0], sum(ranks)]
    parts = zip(np.split(encoders, borders, axis=-1), np.split(decoders, borders, axis=-2), strict=True)
    names = ("key", "value", "rest") if all(ranks) else ("key", "value")
    return {
        f"{name}_{kind}": np.ascontiguousarray(x)
        for name, both in zip(names, parts, strict=False)
        for kind, x in zip(("encoders", "decoders"), both, strict=True)
    }


def pairs(head_size: int, tokens: int, seed: int = 0) -> tuple[Array, Array]:
    """Keys with centers far beyond their spread, values with heavy tails; both nearly of a quarter of the rank."""
    rng, shape = np.random.default_rng(seed), np.random.default_rng(99)
    mixing = shape.normal(size=(2, head_size // 4, head_size))
    keys = rng.normal(size=(tokens, head_size // 4)) @ mixing[0] + shape.normal(size=head_size) * 20
    values = rng.standard_t(3, size=(tokens, head_size // 4)) @ mixing[1] * 0.1
    noise = rng.normal(size=(2, tokens, head_size)) * 0.05
    return (keys + noise[0]).astype(np.float32), (values + noise[1]).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """Pairs [T, D] of head 1 of 2, with the statistics of other pairs of the same kind."""

    codec: NativeCodec
    keys: Array
    values: Array
    statistics: kernels.HeadStatistics
    low: tuple[LowRank | None, LowRank | None]
    rest: LowRank | None

    @property
    def head_size(self) -> int:
        return int(self.keys.shape[1])

    def encode(self) -> Array:
        return kernels.encode_blocks(self.codec, self.statistics, self.keys, self.values)

    def decode(self, blocks: Array) -> tuple[Array, Array]:
        keys, values = kernels.decode_blocks(self.codec, self.statistics, self.head_size, blocks)
        return keys.swapaxes(1, 2).reshape(-1, self.head_size), values.reshape(-1, self.head_size)

    def sides(self) -> tuple[Side, Side]:
        c, s, (of_keys, of_values) = self.codec, self.statistics, self.low
        return (
            Side(c.key_bits, c.outliers, s.key_center, s.key_spread, levels(s.key_levels), True, c.grouped, of_keys),
            Side(
                c.value_bits, c.outliers, s.value_center, s.value_spread, levels(s.value_levels),
                of_values is not None, c.grouped, of_values,
            ),
        )  # fmt: skip

    def twin_bytes(self) -> Array:
        rows = [slice(t, t + BLOCK) for t in range(0, len(self.keys), BLOCK)]
        with np.errstate(over="ignore"):
            return np.stack([
                reference_codecs.encode_block(*self.sides(), self.keys[at], self.values[at], self.rest) for at in rows
            ])  # fmt: skip

    def twin_pairs(self, blocks: Array) -> tuple[Array, Array]:
        parts = [reference_codecs.decode_block(*self.sides(), self.head_size, block, self.rest) for block in blocks]
        return np.concatenate([keys for keys, _ in parts]), np.concatenate([values for _, values in parts])


def levels(found: Array) -> Array | None:
    return found if found.size else None


def make_case(
    form: str, shape: tuple[int, int, int], tokens: int = 48, change: Callable[[Array], object] | None = None
) -> Case:  # fmt: skip
    head_size, *ranks = shape
    rng = np.random.default_rng(7)
    codec = NativeCodec(**FORMS[form], key_rank=ranks[0], value_rank=ranks[1])
    parts = cut(*projections(rng, 2, head_size * (2 if all(ranks) else 1)), ranks)
    basis = kernels.LowRankBasis(**parts)
    assert (basis.key_rank, basis.value_rank) == tuple(ranks)
    statistics = kernels.calibrate(codec, *pairs(head_size, 256, seed=1), basis, 0, 1)
    keys, values = pairs(head_size, tokens)
    if change is not None:
        change(keys)
        change(values)
    mean = np.concatenate([statistics.key_mean, statistics.value_mean])  # a side without a rank has none
    low = {
        name: LowRank(mean, parts[name + "_encoders"][0, 1], parts[name + "_decoders"][0, 1])
        for name in ("key", "value", "rest")
        if parts.get(name + "_encoders", np.zeros(0)).size
    }
    return Case(codec, keys, values, statistics, (low.get("key"), low.get("value")), low.get("rest"))


def check_pairs(case: Case, blocks: Array) -> None:
    """Coefficients as the codec gives them (a few roundings of float32, see test_codecs), then a sum of R products onto
    the mean: R + 1 roundings, each of at most the sum of the parts' sizes."""
    twins, sides = case.twin_pairs(blocks), case.sides()
    pairs = np.hstack(twins)
    for number, (got, twin, side) in enumerate(zip(case.decode(blocks), twins, sides, strict=True)):
        parts, roundings = np.abs(twin) + 2 * np.abs(side.center).max() + 4 * np.abs(side.spread).max(), 6
        if side.low is not None:
            of = [one for one in (*case.low, case.rest) if one is not None]
            decoder = np.concatenate([one.decoder for one in of]).astype(np.float64)
            whole = pairs if case.low[0] and case.low[1] else twin
            sizes = np.abs((whole - side.low.mean) @ np.linalg.pinv(decoder))
            for at, one in ((0, sides[0]), (sides[0].stored(0) if sides[0].low else 0, sides[1])):
                if one.low is not None:
                    rank = one.stored(0)
                    sizes[:, at : at + rank] += 2 * np.abs(one.center[:rank]) + 4 * one.spread[:rank]
            parts, roundings = sizes @ np.abs(decoder) + np.abs(side.low.mean), 9 + len(decoder)
            if whole is pairs:
                parts = parts[:, number * case.head_size :][:, : case.head_size]
        assert np.isfinite(got).all()
        assert (np.abs(got - twin) <= roundings * 2.0**-24 * parts + 1e-38).all(), np.abs(got - twin).max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_bytes_and_numbers_equal_the_twin(every_variant: Sequence[str], form: str, shape: tuple[int, int, int]) -> None:
    case = make_case(form, shape)
    blocks = case.encode()
    assert blocks.shape == (3, kernels.block_bytes(case.codec, case.head_size))
    assert blocks.shape[1] == reference_codecs.block_bytes(*case.sides(), case.head_size, case.rest)
    np.testing.assert_array_equal(blocks, case.twin_bytes())
    for name in every_variant:
        kernels.select_variant(name)
        check_pairs(case, blocks)


def test_the_check_fails_on_a_wrong_decoder() -> None:
    case = make_case("q8", (64, 32, 32))
    keys = case.low[0]
    assert keys is not None
    wrong = keys.decoder.copy()
    wrong[31, 127] += 0.01
    spoilt = replace(case, low=(LowRank(keys.mean, keys.encoder, wrong), case.low[1]))
    with pytest.raises(AssertionError):
        check_pairs(spoilt, case.encode())
    with pytest.raises(AssertionError):
        check_pairs(replace(case, rest=None), case.encode())


@pytest.mark.parametrize("form", ["f16", "q4", "grouped 2", "uneven 2, outliers"])
def test_statistics_are_of_the_coefficients(form: str) -> None:
    case = make_case(form, (64, 13, 40))
    sample = pairs(64, 256, seed=1)
    for x, side, mean in zip(sample, case.sides(), (case.statistics.key_mean, case.statistics.value_mean), strict=True):
        assert side.low is not None
        np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-5, atol=1e-6)
        coefficients = side.low.coefficients(np.hstack(sample))
        twin = reference_codecs.calibrate_side(
            min(side.bits, 8), coefficients, keys=True, outliers=side.outliers, nonuniform=case.codec.nonuniform
        )
        np.testing.assert_allclose(side.center, twin.center, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(side.spread, twin.spread, rtol=1e-6)
        if side.levels is not None and twin.levels is not None:
            np.testing.assert_allclose(side.levels, twin.levels, rtol=1e-5, atol=1e-6)


def test_what_lies_in_the_subspace_comes_back() -> None:
    """Of a full rank all channels; of a part of it what the projection keeps, and each block's mean of the rest."""
    case = make_case("f16", (64, 64, 64))
    for got, x in zip(case.decode(case.encode()), (case.keys, case.values), strict=True):
        np.testing.assert_allclose(got, x, rtol=2.0**-9, atol=2.0**-6)
    case = make_case("f16", (64, 40, 30))
    pairs, kept = np.hstack([case.keys, case.values]).astype(np.float64), np.zeros((48, 128))
    for low in case.low:
        assert low is not None
        kept += (pairs - low.mean) @ low.encoder @ low.decoder
    rest = case.rest
    assert rest is not None
    means = ((pairs - rest.mean) @ rest.encoder).reshape(3, BLOCK, -1).mean(axis=1)
    step = np.abs(means).max(axis=1, keepdims=True) / 7.5
    error = np.hstack(case.decode(case.encode())) - rest.mean - kept - np.repeat(means @ rest.decoder, BLOCK, axis=0)
    assert (np.abs(error) <= np.repeat(0.51 * step @ np.abs(rest.decoder).sum(0)[None], BLOCK, axis=0) + 0.05).all()
    assert np.abs(np.repeat(means @ rest.decoder, BLOCK, axis=0)).max() > 1
    assert np.abs(kept + rest.mean - pairs).max() > 1


def not_numbers(x: Array) -> None:
    x[2, 3], x[17] = np.nan, np.nan


def everything_bad(x: Array) -> None:
    x[:16] = np.nan
    x[16:24] = np.inf
    x[24:] = -3e38


HOSTILE: dict[str, Callable[[Array], object]] = {
    "zeros": lambda x: x.fill(0.0),
    "constant": lambda x: x.fill(7.5),
    "tiny": lambda x: np.multiply(x, 1e-40, out=x),
    "large": lambda x: np.multiply(x, 1e4, out=x),
    "one huge": lambda x: x.__setitem__((7, 2), 1e38),
    "infinity": lambda x: x.__setitem__((3, 5), -np.inf),
    "not numbers": not_numbers,
    "everything bad": everything_bad,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_pairs(every_variant: Sequence[str], form: str, hostile: str) -> None:
    case = make_case(form, (16, 7, 9), tokens=32, change=HOSTILE[hostile])
    blocks = case.encode()
    np.testing.assert_array_equal(blocks, case.twin_bytes())
    for name in every_variant:
        kernels.select_variant(name)
        check_pairs(case, blocks)


@pytest.mark.parametrize("form", FORMS)
def test_any_bytes_are_decoded_to_finite_numbers(every_variant: Sequence[str], form: str) -> None:
    """A block is data: it may come from a file that somebody made. Only infinite halves are left out."""
    case = make_case(form, (64, 13, 9))
    blocks = np.random.default_rng(3).integers(0, 256, case.encode().shape, dtype=np.uint8)
    blocks[:, 1::2] &= 0xBB
    blocks[:, ::2] &= 0xBB
    for name in every_variant:
        kernels.select_variant(name)
        assert all(np.isfinite(x).all() for x in case.decode(blocks))


def test_what_does_not_fit_is_refused() -> None:
    case = make_case("q4", (64, 32, 32))
    for rank in (-1, 1, LEAST_RANK - 1, 257):
        with pytest.raises(ValueError, match="ranks are 0 or from 4 to 256"):
            NativeCodec(key_bits=4, value_bits=4, key_rank=rank)
    with pytest.raises(ValueError, match="at most the head size"):
        kernels.block_bytes(NativeCodec(key_bits=4, value_bits=4, value_rank=65), 64)
    other = NativeCodec(key_bits=4, value_bits=4, key_rank=31, value_rank=32)
    assert not case.statistics.fit(other, 64)
    with pytest.raises(ValueError, match="not of this codec"):
        kernels.encode_blocks(other, case.statistics, case.keys, case.values)
    with pytest.raises(ValueError, match="not of this codec"):
        kernels.decode_blocks(other, case.statistics, 64, case.encode())
    f16 = NativeCodec(key_bits=16, value_bits=16, key_rank=31, value_rank=31)
    with pytest.raises(ValueError, match="not of this codec"):
        kernels.encode_blocks(f16, case.statistics, case.keys, case.values)
    with pytest.raises(ValueError, match="wants the projections"):
        kernels.calibrate(other, case.keys, case.values)


def test_a_basis_is_checked() -> None:
    parts = cut(*projections(np.random.default_rng(0), 2, 32), (8, 8))

    def make(change: Callable[[Array, Array], tuple[Array, Array]], name: str = "key") -> kernels.LowRankBasis:
        encoders, decoders = (f"{name}_{kind}" for kind in ("encoders", "decoders"))
        changed = change(parts[encoders].copy(), parts[decoders].copy())
        return kernels.LowRankBasis(**{**parts, encoders: changed[0], decoders: changed[1]})

    assert make(lambda e, d: (e, d)).value_rank == 8
    with pytest.raises(ValueError, match="the rest of a basis of pairs is all other coefficients"):
        make(lambda e, d: (e[..., :-1], d[:, :, :-1]), "rest")
    with pytest.raises(ValueError, match="the rest of a basis"):
        kernels.LowRankBasis(**{name: x for name, x in parts.items() if "rest" not in name})
    for change in (
        lambda e, d: (e, d[..., :31]), lambda e, d: (e, d[:, :1]), lambda e, d: (e[..., :7], d),
        lambda e, d: (e[..., :3], d[:, :, :3]), lambda e, d: (np.where(e > 0, np.nan, e), d),
        lambda e, d: (e, d * np.float32(1e38)), lambda e, d: (e[0], d[0]), lambda e, d: (e[:, :, :31], d[..., :31]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="encoders must be|not finite|a basis |head size"):
            make(change)
