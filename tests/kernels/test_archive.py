"""The archive against its twin, and what must not change whatever is done to it."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.kernels.reference_archive import BLOCK, HeadPairs, Recall, landmarks

Array = NDArray[Any]
F16, Q8, Q2 = (16, 16, False, 0, False), (8, 8, False, 0, False), (2, 2, False, 0, False)
HALF = 2.0**-11  # relative error of a half float
UNLIMITED = 1 << 40


@cache
def block(seed: int, layer: int, number: int, heads: int, kv_heads: int, size: int) -> tuple[Array, Array, Array]:
    """16 queries, keys and values."""
    rng = np.random.default_rng((seed, layer, number))
    q, k, v = (rng.normal(size=(16, n, size)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    return q, (k / 2 + rng.normal(size=(1, kv_heads, size))).astype(np.float32), v


@dataclass
class Talk:
    """A native cache of one layer or more and the pairs that it was given."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    rotated: int = 12
    factor: float = 1.0
    sinks: int = 16
    recall: int = 64
    storage: str = "fp32"
    threads: int = 1
    layers: int = 1
    archive: dict[str, Any] = field(default_factory=dict)
    cache: kernels.KVCache = field(init=False)
    position: int = 0
    raw: list[Array] = field(default_factory=list)  # [K, T, D] keys of layer 0 as they were archived
    calibrated: int = 0
    seed: int = 0
    limit_bytes: int = 0

    def __post_init__(self) -> None:
        options = {
            "high": F16, "low": F16, "digest": 1, "sinks": self.sinks, "recall_tokens": self.recall, "recall_every": 1,
            "window": 64, "warm_limit_bytes": UNLIMITED,
        }  # fmt: skip
        self.cache = kernels.KVCache(
            layers=self.layers, heads=self.heads, kv_heads=self.kv_heads, head_size=self.size, storage=self.storage,
            threads=self.threads, limit_bytes=self.limit_bytes, archive={**options, **self.archive},
        )  # fmt: skip

    @property
    def frequencies(self) -> Array:
        return (1000.0 ** (-np.arange(self.rotated // 2) / max(self.rotated // 2, 1))).astype(np.float32)

    @property
    def scale(self) -> float:
        return float(self.size**-0.5)

    def fork(self) -> Talk:
        twin = object.__new__(Talk)
        twin.__dict__.update(self.__dict__)
        twin.cache, twin.raw = self.cache.fork(), list(self.raw)
        return twin

    def pairs(self, tokens: int, layer: int = 0) -> tuple[Array, Array, Array]:
        """Depend on the seed and on positions only; blocks of 16 keys lie near each other, as in a text."""
        first, last = self.position // 16, (self.position + tokens - 1) // 16
        blocks = [block(self.seed, layer, b, self.heads, self.kv_heads, self.size) for b in range(first, last + 1)]
        mine = slice(self.position - first * 16, self.position - first * 16 + tokens)
        q, k, v = (np.concatenate(parts)[mine] for parts in zip(*blocks, strict=True))
        return q, k, v

    def run(self, layer: int, q: Array, k: Array, v: Array, **options: Any) -> Array:
        return self.cache.attend(
            layer, q, k, v, np.arange(self.position, self.position + len(q)), self.frequencies, scale=self.scale,
            attention_factor=self.factor, threads=self.threads, **options,
        )  # fmt: skip

    def read(self, tokens: int, **options: Any) -> Array:
        """A chunk through all layers: outputs [layers, T, H, D]."""
        out = np.stack([self.run(layer, *self.pairs(tokens, layer), **options) for layer in range(self.layers)])
        self.cache.commit()
        self.position += tokens
        return out

    def read_and_store(self) -> Talk:
        self.read(600)
        return self.store(512)

    def store(self, until: int, scores: Array | None = None, drop: bool = True) -> Talk:
        before = self.cache.archived_until
        fresh = []
        for head in range(self.kv_heads):
            keys, _, places = self.cache.read(0, head, rotated=False)
            fresh.append(keys[(places >= before) & (places < until)])
        self.cache.archive(until, scores, threads=self.threads)
        self.raw.append(np.stack(fresh))
        self.calibrated = self.calibrated or until
        if drop:
            self.cache.drop_archived()
        return self

    def twin(self, **options: Any) -> Recall:
        return Recall(
            self.sinks, self.recall, self.frequencies, self.scale, self.factor,
            reach=self.archive.get("reach", 0), **options,
        )  # fmt: skip

    def held(self, lost: tuple[int, ...] = ()) -> list[HeadPairs]:
        """Layer 0 as it is now."""
        keys = np.concatenate(self.raw, axis=1)
        heads = []
        for head in range(self.kv_heads):
            marks = landmarks(keys[head], self.calibrated, self.sinks, self.frequencies, self.factor)
            marks = marks if self.archive.get("digest", 1) else marks[:0]
            heads.append(HeadPairs(*self.cache.read(0, head), *self.cache.read_archive(0, head), marks, lost))
        return heads

    def check(self, tokens: int, tolerance: float = 2e-5, lost: tuple[int, ...] = (), **options: Any) -> Recall:
        """Reads a chunk and compares it with the twin's; where a vote was too close to call, it is not compared."""
        q, first = self.pairs(tokens)[0], self.position
        got, twin = self.read(tokens, **options)[0], self.twin(**options)
        expected = twin.attend(q, np.arange(first, first + tokens), self.held(lost))
        sure, group = 0, self.heads // self.kv_heads
        for each in twin.groups:
            if each.margin < 3e-3:
                continue
            sure += 1
            rows, mine = slice(each.first, each.last), slice(each.kv_head * group, (each.kv_head + 1) * group)
            np.testing.assert_allclose(got[rows, mine], expected[rows, mine], atol=tolerance, rtol=tolerance)
            if tokens == 1:
                assert self.cache.recalled(0, each.kv_head) == each.blocks.tolist()
        assert sure >= 0.7 * len(twin.groups) - 1
        return twin


def same(one: Array, other: Array) -> None:
    np.testing.assert_array_equal(one, other)


# --- against the twin


@pytest.mark.parametrize("until", [64, 128, 192, 256, 320, 512, 576])
def test_boundaries_of_cells_and_pages(until: int) -> None:
    for more in (0, 1, 63, 64, 65):
        talk = Talk(seed=more)
        talk.read(until + more)
        talk.store(until)
        talk.check(1)
        talk.check(5)


@pytest.mark.parametrize("chunk", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks(chunk: int, storage: str, threads: int) -> None:
    talk = Talk(storage=storage, threads=threads, seed=chunk)
    talk.read(650)
    talk.store(576)
    for _ in range(2):
        talk.check(chunk)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotated", "factor"),
    [
        (1, 1, 16, 16, 1.0), (2, 1, 64, 64, 1.0), (9, 3, 64, 64, 1.0), (7, 1, 80, 80, 1.0), (4, 2, 80, 32, 1.3),
        (14, 2, 64, 64, 0.7), (3, 3, 128, 128, 1.2), (4, 1, 128, 32, 1.0), (4, 2, 16, 2, 1.1), (4, 2, 16, 0, 1.0),
    ],
)  # fmt: skip
def test_shapes(heads: int, kv_heads: int, size: int, rotated: int, factor: float) -> None:
    talk = Talk(heads, kv_heads, size, rotated, factor, threads=2, storage="bf16")
    talk.read(500)
    talk.store(320).store(448)
    talk.check(1)
    talk.check(9)
    talk.check(70)


@pytest.mark.parametrize("reach", [1000, 500, 449, 300, 192])
def test_reach_moves_what_is_too_far_away(reach: int) -> None:
    talk = Talk(archive={"reach": reach}, factor=1.1)
    talk.read(700)
    talk.store(640)
    for tokens in (1, 3, 66):
        talk.check(tokens)
    twin = talk.twin()
    assert twin.first_seen(699) == max(0, 700 - reach)
    assert twin.seen_positions([1, 2, 39], 699) == {
        1000: [16, 32, 624], 500: [216, 232, 624], 449: [267, 283, 624], 300: [416, 432, 624], 192: [524, 540, 624],
    }[reach]  # fmt: skip


def test_a_reach_smaller_than_what_is_recalled_is_survived() -> None:
    talk = Talk(archive={"reach": 32}, sinks=64, recall=512)
    talk.read(900)
    talk.store(832)
    talk.check(1)
    talk.check(70)


def test_softcap() -> None:
    """Caps what is attended; votes are counted before it."""
    talk = Talk(recall=UNLIMITED >> 12)
    talk.read(400)
    talk.store(320)
    talk.check(20, softcap=1.5)


def test_what_came_from_several_stores() -> None:
    talk = Talk(sinks=32, recall=96, threads=2)
    talk.read(200)
    talk.store(64).store(128)
    for _ in range(5):
        talk.check(90)
        talk.store((talk.position - 64) // 64 * 64)
    assert talk.cache.archived_until == 576
    talk.check(1)


def test_a_rollback_of_nothing_keeps_the_choice() -> None:
    talk = Talk(archive={"recall_every": 4})
    talk.read(600)
    talk.store(512)
    chosen = []
    for _ in range(9):
        talk.cache.rollback()  # as every run of an engine begins
        talk.read(1)
        chosen.append(tuple(talk.cache.recalled(0, 0)))
    assert len(set(chosen[:4])) == len(set(chosen[4:8])) == 1
    talk.run(0, *talk.pairs(1))
    talk.cache.rollback()
    talk.read(1)
    assert tuple(talk.cache.recalled(0, 0)) != chosen[8], "a run that did not happen has chosen nothing"


@pytest.mark.parametrize("nothing", ["sinks", "recall"])
def test_no_sinks_or_nothing_recalled(nothing: str) -> None:
    talk = Talk(**{nothing: 0})
    talk.read(300)
    talk.store(256)
    talk.check(1)
    talk.check(30)
    assert (talk.cache.recalled(0, 0) == []) == (nothing == "recall")


def test_without_digests_the_latest_blocks_come() -> None:
    talk = Talk(archive={"digest": 0})
    talk.read(400)
    talk.store(320)
    talk.read(1)
    assert talk.cache.recalled(0, 1) == [16, 17, 18, 19]
    assert talk.cache.archive_usage()["digest_bytes"] == 0


# --- invariants


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_recall_of_everything_is_the_full_cache(storage: str, factor: float) -> None:
    """Keys and values differ by half a unit of half precision, so logits by |q||k| of that, and outputs accordingly."""
    talk = Talk(recall=1 << 20, storage=storage, factor=factor, threads=2)
    full = Talk(storage=storage, factor=factor, threads=2)
    for each in (talk, full):
        each.read(400)
    talk.store(320)
    unit = HALF if storage == "fp32" else 2.0**-8  # what comes back is bf16 of other numbers
    logits = factor**2 * talk.scale * talk.size * 5 * unit
    for tokens in (1, 5, 70):
        limit = 4 * 2 * (np.expm1(2 * logits) + unit)  # values up to 4
        np.testing.assert_allclose(talk.read(tokens), full.read(tokens), atol=min(limit, 0.05))


@pytest.mark.parametrize("drop", [False, True])
def test_what_is_hot_is_not_counted_twice(drop: bool) -> None:
    talk, full = Talk(recall=1 << 20), Talk()
    for each in (talk, full):
        each.read(400)
    talk.store(320, drop=False)
    if drop:  # a scorer keeps some of them
        rng = np.random.default_rng(3)
        for head in range(2):
            kept = np.sort(rng.choice(320, 100, replace=False))
            talk.cache.retain(0, head, np.concatenate([kept, np.arange(320, 400)]).astype(np.int32))
        talk.check(1)
        talk.check(20)
        full.read(21)
    for tokens in (1, 5, 70):
        got, expected = talk.read(tokens), full.read(tokens)
        np.testing.assert_allclose(got, expected, atol=0.02 if drop else 1e-6)


CODECS = {"f16": (F16, F16), "q8": (Q8, Q8), "mikv": (Q8, Q2), "q4": ((4, 4, False, 0, False),) * 2}


@pytest.mark.parametrize("codec", CODECS)
def test_warm_is_cold_bit_for_bit(codec: str, tmp_path: Path) -> None:
    high, low = CODECS[codec]
    options = {"high": high, "low": low, "recall_every": 3}
    cold = {"warm_limit_bytes": 0, "cold_folder": str(tmp_path), "cold_limit_bytes": UNLIMITED}
    warm = Talk(layers=2, archive=options, threads=2)
    cool = Talk(layers=2, archive={**options, **cold}, threads=2)
    half = Talk(layers=2, archive={**options, **cold, "warm_limit_bytes": 40_000}, threads=2)
    for talk in (warm, cool, half):
        talk.read(300)
        talk.store(192)
        talk.read(200)
        talk.store(384)
    for tokens in (1, 1, 1, 1, 1, 30, 1, 70, 1, 1):
        expected = warm.read(tokens)
        same(cool.read(tokens), expected)
        same(half.read(tokens), expected)
    for head in range(2):
        same(cool.cache.read_archive(1, head)[0], warm.cache.read_archive(1, head)[0])
    usage, other = warm.cache.archive_usage(), cool.cache.archive_usage()
    assert (usage["warm_bytes"], usage["cold_bytes"]) == (other["cold_bytes"], other["warm_bytes"])
    assert other["warm_bytes"] == usage["flash_bytes_read"] == 0
    assert other["flash_bytes_read"] > 0
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("place", ["memory", "file", "both"])
@pytest.mark.parametrize("reach", [0, 900])
def test_a_choice_is_attended_in_parts(place: str, reach: int, tmp_path: Path) -> None:
    """1,200 recalled tokens are more than the 1,024 of a part, and a part may begin anywhere on another thread."""
    archive = {"cold_folder": str(tmp_path), "cold_limit_bytes": UNLIMITED, "reach": reach}
    archive["warm_limit_bytes"] = {"memory": UNLIMITED, "file": 0, "both": 60_000}[place]
    talk = Talk(recall=1200, threads=3, archive=archive)
    talk.read(1500)
    talk.store(1408)
    for tokens in (1, 5, 70):
        assert talk.check(tokens).groups
    one, three = (Talk(recall=1200, threads=threads, archive=archive) for threads in (1, 3))
    for each in (one, three):
        each.read(1500)
        each.store(1408)
    np.testing.assert_allclose(one.read(1), three.read(1), atol=1e-6)


def test_a_choice_serves_several_tokens() -> None:
    talk = Talk(archive={"recall_every": 4})
    talk.read(400)
    talk.store(320)
    chosen = []
    for _ in range(9):
        talk.read(1)
        chosen.append(talk.cache.recalled(0, 0))
    assert chosen[0] == chosen[3] != chosen[4] == chosen[7] != chosen[8]


# --- forks


@pytest.mark.parametrize("warm", [UNLIMITED, 20_000, 0])
@pytest.mark.parametrize("writer", ["parent", "child"])
def test_forks_do_not_disturb_each_other(warm: int, writer: str, tmp_path: Path) -> None:
    options = {
        "warm_limit_bytes": warm, "cold_folder": str(tmp_path), "cold_limit_bytes": UNLIMITED, "recall_every": 5,
    }  # fmt: skip

    def begun() -> Talk:
        talk = Talk(layers=2, archive=options)
        talk.read(300)
        talk.store(192)  # in the middle of a page of digests
        talk.read(1)  # and a choice is held
        return talk

    parent, alone = begun(), begun()
    child = parent.fork()
    writes, keeps = (parent, child) if writer == "parent" else (child, parent)
    writes.seed = 7
    writes.read(200)
    writes.store(384)
    writes.read(1)
    for tokens in (1, 1, 20, 1):
        same(keeps.read(tokens), alone.read(tokens))
    for talk in (keeps, alone):
        talk.read(100)
        talk.store(320)
    writes.check(70)
    writes.check(1)
    for tokens in (1, 40):
        same(keeps.read(tokens), alone.read(tokens))
    keeps.check(1)
    parent.cache.close()
    child.read(3)


def test_a_fork_may_move_what_another_has_chosen(tmp_path: Path) -> None:
    """The blocks of a held choice are read in place, in memory, until a fork needs the room."""
    probe = Talk()
    probe.read(300)
    stored = probe.store(192).cache.archive_usage()["warm_bytes"]
    options = {"warm_limit_bytes": stored, "recall_every": 100}
    cold = {"cold_folder": str(tmp_path), "cold_limit_bytes": UNLIMITED}
    for more, seen in ((cold, True), ({}, False)):  # to the file; lost
        parent, alone = Talk(archive={**options, **more}), Talk(archive={**options, **more})
        for talk in (parent, alone):
            talk.read(300)
            talk.store(192)
            talk.read(1)
        child = parent.fork()
        child.read(100)
        child.store(320)
        assert child.cache.archive_usage()["lost_tokens"] == (0 if seen else 192)
        out = [parent.read(1), parent.read(1)]
        if seen:
            same(out[0], alone.read(1))
            same(out[1], alone.read(1))
        assert np.isfinite(out[0]).all()
        parent.read(10)


# --- rollback and forgetting


@pytest.mark.parametrize("failed", [1, 40, 200])
def test_rollback_of_a_chunk(failed: int) -> None:
    talk, never = Talk(layers=2), Talk(layers=2)
    for each in (talk, never):
        each.read(300)
        each.store(192)
        each.read(1)
    talk.seed = 9
    talk.run(0, *talk.pairs(failed))  # layer 1 is never reached
    talk.cache.rollback()
    talk.seed = 0
    for tokens in (1, 40, 1, 70):
        same(talk.read(tokens), never.read(tokens))


def test_rollback_forgets_the_choice() -> None:
    talk = Talk(archive={"recall_every": 50})
    talk.read(300)
    talk.store(256)
    q, k, v = talk.pairs(1)
    talk.run(0, -3 * q, k, v)
    wrong = talk.cache.recalled(0, 0)
    talk.cache.rollback()
    talk.check(1)
    assert talk.cache.recalled(0, 0) != wrong
    talk.cache.forget_from(talk.position - 1)
    talk.position -= 1
    talk.run(0, -3 * q, k, v)
    assert talk.cache.recalled(0, 0) == wrong


@pytest.mark.parametrize("position", [0, 1, 10, 31, 32, 50, 64, 100, 130, 192, 250, 383, 384, 385, 449])
@pytest.mark.parametrize("cold", [False, True])
def test_forget_from(position: int, cold: bool, tmp_path: Path) -> None:
    """As if what is forgotten had never been read, but for pairs that come back from the archive as it has them."""
    options: dict[str, Any] = {"window": 48}
    if cold:
        options |= {"warm_limit_bytes": 0, "cold_folder": str(tmp_path), "cold_limit_bytes": UNLIMITED}
    talk, never = (Talk(layers=2, sinks=32, recall=1 << 20, archive=options) for _ in range(2))
    talk.read(300)
    talk.store(128).store(256)
    talk.read(150)
    talk.store(384)
    talk.cache.forget_from(position)
    if position:
        never.read(position)
    talk.position = position
    stays = 0 if max(position - 48, 0) // 64 * 64 < 32 else max(position - 48, 0) // 64 * 64
    archived = 384 if position >= 384 else stays
    assert talk.cache.archived_until == archived
    assert talk.cache.tokens(1, 0) == position - archived
    for layer in range(2):
        same(talk.cache.positions(layer, 1), np.arange(archived, position))
    usage = talk.cache.archive_usage()
    cell = 2 * 2 * 64 * 2 * 16 * 2  # layers, heads, tokens, keys and values, D, bytes
    assert usage["warm_bytes"] + usage["cold_bytes"] == archived // 64 * cell
    limit = 0.05 if position > 0 else 0
    for tokens in (70, 1, 100, 1):
        np.testing.assert_allclose(talk.read(tokens), never.read(tokens), atol=limit)
    until = (talk.position - 48) // 64 * 64
    for each in (talk, never):
        each.cache.archive(until)
        each.cache.drop_archived()
    for tokens in (1, 30):
        np.testing.assert_allclose(talk.read(tokens), never.read(tokens), atol=0.05)
    if position == 0:
        same(talk.cache.read_archive(1, 1)[0], never.cache.read_archive(1, 1)[0])


def test_forgetting_everything_measures_anew() -> None:
    options = {"high": Q2, "low": Q2}
    talk, never = Talk(archive=options, seed=5), Talk(archive=options)
    talk.read(200)
    talk.store(128)
    talk.cache.forget_from(0)
    talk.position, talk.seed, talk.raw, talk.calibrated = 0, 0, [], 0
    for each in (talk, never):
        each.read(200)
        each.store(128)
    same(talk.read(1), never.read(1))
    same(talk.cache.read_archive(0, 0)[0], never.cache.read_archive(0, 0)[0])


def test_forgetting_in_a_fork(tmp_path: Path) -> None:
    options = {"warm_limit_bytes": 9000, "cold_folder": str(tmp_path), "cold_limit_bytes": UNLIMITED}
    parent, alone = Talk(archive=options), Talk(archive=options)
    for each in (parent, alone):
        each.read(500)
        each.store(384)
    child = parent.fork()
    child.cache.forget_from(200)
    child.position, child.seed = 200, 3
    child.raw = [np.concatenate(child.raw, axis=1)[:, :128]]
    child.read(200)
    child.store(320)
    for tokens in (1, 20, 70):
        same(parent.read(tokens), alone.read(tokens))
    child.check(1)
    child.check(20)


def test_negative_positions_are_zero() -> None:
    talk = Talk()
    talk.read(200)
    talk.store(128)
    talk.cache.forget_from(-5)
    assert (talk.cache.archived_until, talk.cache.tokens(0, 0)) == (0, 0)


# --- what fails changes nothing


def state(talk: Talk) -> list[Array]:
    found = []
    for layer in range(talk.layers):
        for head in range(talk.kv_heads):
            found += [*talk.cache.read(layer, head), *talk.cache.read_archive(layer, head)]
    return found


@pytest.mark.parametrize("until", [-64, 0, 1, 63, 100, 192, 448, 1 << 30, 2**31 - 64])
def test_archive_refuses(until: int) -> None:
    talk = Talk(layers=2)
    talk.read(300)
    talk.store(192)
    before = state(talk)
    with pytest.raises(ValueError, match="whole steps of 64|not all tokens before"):
        talk.cache.archive(until)
    for one, other in zip(state(talk), before, strict=True):
        same(one, other)
    assert talk.cache.archived_until == 192


def test_archive_needs_the_sinks_and_settings_that_fit() -> None:
    talk = Talk(sinks=80)
    talk.read(200)
    with pytest.raises(ValueError, match="with all sinks"):
        talk.cache.archive(64)
    talk.store(128)
    talk.check(1)
    for change in ({"sinks": 8}, {"recall_tokens": 10}, {"recall_every": 0}, {"sinks": -16}, {"nothing": 1}):
        with pytest.raises(ValueError, match="Archive|archive"):
            Talk(archive=change)
    with pytest.raises(ValueError, match="no archive"):
        kernels.KVCache(layers=1, heads=1, kv_heads=1, head_size=16).archive(64)
    talk.read(100)
    with pytest.raises(ValueError, match="block_scores must be"):
        talk.cache.archive(192, np.zeros((1, 2, 5), np.float32))


@pytest.mark.parametrize("stored", [0, 128])
def test_a_missing_folder_changes_nothing(stored: int, tmp_path: Path) -> None:
    folder = tmp_path / "cold"
    talk, never = (
        Talk(
            layers=2,
            archive={
                "low": Q2, "warm_limit_bytes": 20_000, "cold_folder": str(folder), "cold_limit_bytes": UNLIMITED,
            },
        )
        for _ in range(2)
    )  # fmt: skip
    for each in (talk, never):
        each.read(200)
        if stored:
            each.store(stored)
    talk.read(300)
    before, usage = state(talk), talk.cache.archive_usage()
    with pytest.raises(RuntimeError, match="cannot make a file in"):
        talk.cache.archive(448)
    assert talk.cache.archived_until == stored
    assert talk.cache.archive_usage() == usage
    for one, other in zip(state(talk), before, strict=True):
        same(one, other)
    folder.mkdir()
    never.read(300)
    for each in (talk, never):
        each.store(448)
    for tokens in (1, 30):
        same(talk.read(tokens), never.read(tokens))


def test_no_room_for_the_window_changes_nothing() -> None:
    page = Talk().cache.page_bytes
    talk = Talk(layers=2, limit_bytes=4 * 4 * page, archive={"window": 256})
    talk.read(192)
    talk.store(128)
    talk.read(128)
    talk.store(256)
    fork = talk.fork()  # the fork needs its own pages for what comes back
    fork.position = 320
    for _ in range(3):
        fork.read(64)
    assert fork.cache.pool_bytes == 4 * 4 * page
    before = state(fork)
    with pytest.raises(RuntimeError, match="more than its limit"):
        fork.cache.forget_from(255)
    for one, other in zip(state(fork), before, strict=True):
        same(one, other)
    fork.cache.forget_from(500)
    fork.position = 500
    fork.read(1)


def test_drop_archived_without_room_is_survived() -> None:
    """A fork shares the hot pages and there is no room for copies: what is hot and archived is counted once."""
    page = Talk().cache.page_bytes
    talk = Talk(limit_bytes=2 * 6 * page, recall=1 << 20)
    talk.read(100)
    talk.cache.retain(0, 0, np.arange(1, 100, dtype=np.int32))
    talk.cache.forget_from(0)
    talk.position = 0
    talk.read(300)
    full = Talk()
    full.read(300)
    talk.store(192, drop=False)
    np.testing.assert_allclose(talk.read(5), full.read(5), atol=1e-6)


def lost_blocks(talk: Talk) -> tuple[int, ...]:
    return tuple(range(talk.cache.archive_usage()["lost_tokens"] // BLOCK))


@pytest.mark.parametrize("recall", [64, 1 << 20])
def test_without_room_the_oldest_is_lost(recall: int) -> None:
    cell = 2 * 64 * 2 * 16 * 2
    talk = Talk(recall=recall, archive={"warm_limit_bytes": 5 * cell})
    talk.read(400)
    for until in range(64, 384, 64):
        talk.store(until)
    assert talk.cache.archive_usage()["lost_tokens"] == 0
    talk.read(200)
    talk.store(448).store(512)
    usage = talk.cache.archive_usage()
    assert (usage["lost_tokens"], usage["warm_bytes"]) == (128 + 64, 5 * cell)  # 320..448 came as one extent
    lost = lost_blocks(talk)
    talk.check(1, lost=lost)
    assert min(talk.cache.recalled(0, 0)) >= 12
    talk.check(70, lost=lost)
    assert (talk.cache.read_archive(0, 0)[0][16:192] == 0).all()
    talk.cache.forget_from(300)  # the window of 64 before it was not lost
    assert talk.cache.archived_until == 192
    talk.position = 300
    talk.read(5)
    talk.cache.forget_from(200)  # what was lost does not come back as zeros
    assert talk.cache.archived_until == 192
    same(talk.cache.positions(0, 0), np.arange(192, 200))
    talk.position = 200
    assert np.isfinite(talk.read(10)).all()


def test_a_full_file(tmp_path: Path) -> None:
    cell = 2 * 64 * 2 * 16 * 2
    limits = {"warm_limit_bytes": 0, "cold_folder": str(tmp_path), "cold_limit_bytes": 3 * cell + 5}
    talk = Talk(archive=limits)
    talk.read(500)
    for until in range(64, 448, 64):
        talk.store(until)
    usage = talk.cache.archive_usage()
    assert (usage["cold_bytes"], usage["warm_bytes"], usage["lost_tokens"]) == (3 * cell, 0, 192)
    lost = tuple(range(12, 24))
    talk.check(1, lost=lost)
    talk.check(70, lost=lost)


def test_a_full_disk(tmp_path: Path) -> None:
    """The system refuses to let a file grow (RLIMIT_FSIZE: Python ignores the signal)."""
    cell = 2 * 64 * 2 * 16 * 2
    talk = Talk(archive={"warm_limit_bytes": 0, "cold_folder": str(tmp_path), "cold_limit_bytes": UNLIMITED})
    talk.read(500)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * cell + cell // 2, before[1]))
    try:
        for until in range(64, 384, 64):
            talk.store(until)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    usage = talk.cache.archive_usage()
    assert (usage["cold_bytes"], usage["lost_tokens"]) == (2 * cell, 192)
    talk.check(1, lost=tuple(range(8, 20)))


# --- the rest


def test_layers_with_a_window_recall_nothing() -> None:
    talk, full = Talk(), Talk()
    for each in (talk, full):
        each.read(300)
    talk.store(192)
    for tokens in (1, 20):
        same(talk.read(tokens, window=50), full.read(tokens, window=50))
    assert talk.cache.recalled(0, 0) == []


def test_positions_that_do_not_ascend_are_refused() -> None:
    talk = Talk()
    talk.read(128)
    talk.store(128)
    q, k, v = talk.pairs(1)
    for position, message in ((127, "the archive holds later ones"), (0, "the archive"), (-1, "out of range")):
        with pytest.raises(ValueError, match=message):
            talk.cache.attend(0, q, k, v, np.array([position]), talk.frequencies, scale=1.0)
    talk.read(1)


def test_the_best_block_of_a_cell_has_more_bits() -> None:
    talk = Talk(sinks=0, layers=2, archive={"high": Q8, "low": Q2})
    talk.read(200)
    scores = np.random.default_rng(1).normal(size=(2, 2, 12)).astype(np.float32)
    talk.cache.archive(128, scores[:, :, :8])
    talk.cache.drop_archived()
    talk.cache.archive(192, scores[:, :, 8:])
    for layer in range(2):
        talk.position = 0
        raw = talk.pairs(192, layer)[1]
        for head in range(2):
            error = np.abs(talk.cache.read_archive(layer, head)[0] - raw[:, head]).reshape(12, -1).mean(axis=1)
            best = scores[layer, head].reshape(3, 4).argmax(axis=1) + np.arange(0, 12, 4)
            assert sorted(np.argsort(error)[:3].tolist()) == best.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
def test_bad_numbers_do_not_crash(bad: float) -> None:
    talk = Talk()
    talk.read(300)
    q, k, v = talk.pairs(100)
    k[::7], q[::5] = bad, bad
    talk.run(0, q, k, v)
    talk.cache.commit()
    talk.position += 100
    talk.store(384)
    for tokens in (1, 20, 70):
        q, k, v = talk.pairs(tokens)
        talk.run(0, np.full_like(q, bad), k, v)
        talk.cache.commit()
        talk.position += tokens


def test_usage_from_first_principles() -> None:
    talk = Talk(sinks=32, layers=3, kv_heads=2, size=64, rotated=64)
    assert set(talk.cache.archive_usage().values()) == {0}
    talk.read(400)
    talk.store(320)
    assert talk.cache.archive_usage() == {
        "sink_bytes": 6 * 32 * 2 * 64 * 2, "digest_bytes": 6 * 2 * (64 * 16 + 16 * 4),
        "warm_bytes": 6 * 320 * 2 * 64 * 2, "cold_bytes": 0, "lost_tokens": 0, "flash_bytes_read": 0,
    }  # fmt: skip
