"""What the native cache holds, whatever was done to it: pages, forks, rollback, retaining, limits, closing."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.kernels import reference
from satchel.kernels.reference import CacheReference

Array = NDArray[Any]
PAGE = kernels.PAGE_TOKENS
HEADS, KV_HEADS, SIZE = 2, 2, 16
FREQUENCIES = (100.0 ** (-np.arange(6) / 6)).astype(np.float32)  # 12 of 16 dimensions turn
FACTOR = 1.25
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-8}


def make(layers: int = 2, **options: Any) -> kernels.KVCache:
    return kernels.KVCache(layers=layers, heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, **options)


def pairs(tokens: int, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(tokens, heads, SIZE)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))


def append(cache: kernels.KVCache, layer: int, first: int, tokens: int, seed: int = 0) -> Array:
    """Appends ``tokens`` random pairs from position ``first``; the attention's output."""
    return cache.attend(
        layer, *pairs(tokens, seed), np.arange(first, first + tokens), FREQUENCIES, scale=0.3,
        attention_factor=FACTOR,
    )  # fmt: skip


def fill(cache: kernels.KVCache, layers: int, tokens: int, first: int = 0, seed: int = 0) -> None:
    for layer in range(layers):
        append(cache, layer, first, tokens, seed + layer)
    cache.commit()


def snapshot(cache: kernels.KVCache, layers: int = 2) -> list[Array]:
    """Copies of everything that a cache holds, keys in both forms."""
    return [
        array
        for layer in range(layers)
        for head in range(KV_HEADS)
        for rotated in (True, False)
        for array in cache.read(layer, head, rotated)
    ]


def assert_same(one: list[Array], other: list[Array]) -> None:
    assert [array.shape for array in one] == [array.shape for array in other]
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


# --- reading back


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 3])
def test_what_was_appended_can_be_read(storage: str, tokens: int) -> None:
    cache, twin = make(storage=storage), CacheReference(2, KV_HEADS, SIZE, FREQUENCIES, FACTOR)
    append(cache, 1, 0, tokens)
    _, k, v = pairs(tokens)
    twin.append(1, k, v, np.arange(tokens))
    for head in range(KV_HEADS):
        compare(cache, twin, 1, head, UNIT[storage])
        assert cache.read(0, head)[0].shape == (0, SIZE)


def compare(cache: kernels.KVCache, twin: CacheReference, layer: int, head: int, unit: float) -> None:
    """Rotation adds a few float32 roundings; taking it back, with the storage's rounding, once more."""
    held = twin.heads[layer][head]
    keys, values, places = cache.read(layer, head)
    np.testing.assert_array_equal(places, held.positions)
    assert places.dtype == np.int32
    np.testing.assert_allclose(values, held.values, rtol=unit)
    size = np.abs(held.keys).max(initial=1.0)
    np.testing.assert_allclose(keys, held.keys, rtol=unit, atol=size * 4 * UNIT["fp32"])
    raw, again, _ = cache.read(layer, head, rotated=False)
    np.testing.assert_allclose(raw, held.raw_keys, atol=size * (2 * unit + 8 * UNIT["fp32"]))
    np.testing.assert_array_equal(again, values)
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    np.testing.assert_allclose(cache.value_norms(layer, head, 0, 2**31 - 1), norms, rtol=1e-5, atol=1e-6)
    if len(places) > 2:
        some = cache.value_norms(layer, head, places[1], places[-1])
        np.testing.assert_allclose(some, norms[1:-1], rtol=1e-5, atol=1e-6)


def test_bf16_rounds_to_nearest_even() -> None:
    cache = kernels.KVCache(layers=1, heads=1, kv_heads=1, head_size=16, storage="bf16")
    step = 2.0**-7  # of bfloat16 between 1 and 2
    wanted = [1, 1 + 0.49 * step, 1 + 0.5 * step, 1 + 0.51 * step, 1 + 1.5 * step, -1 - 1.5 * step, 3.4e38, 1e-45]
    wanted += [0.0, -0.0, np.inf, -np.inf, 65504, 1 / 3, 1e-30, 2.0**127]
    v = np.array(wanted, np.float64).astype(np.float32).reshape(1, 1, 16)
    zeros = np.zeros((1, 1, 16), np.float32)
    cache.attend(0, zeros, zeros, v, np.zeros(1, np.int64), np.zeros(0, np.float32), scale=1.0)
    got = cache.read(0, 0)[1][0]
    np.testing.assert_array_equal(got[:6], [1, 1, 1, 1 + step, 1 + 2 * step, -1 - 2 * step])
    np.testing.assert_array_equal(got[6:13], [np.inf, 0, 0, 0, np.inf, -np.inf, 65536])
    assert got[13] == pytest.approx(1 / 3, rel=2**-8)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000])
def test_bf16_keeps_nan(bits: int) -> None:
    cache = kernels.KVCache(layers=1, heads=1, kv_heads=1, head_size=16, storage="bf16")
    zeros = np.zeros((1, 1, 16), np.float32)
    v = np.full((1, 1, 16), bits, np.uint32).view(np.float32)
    cache.attend(0, zeros, zeros, v, np.zeros(1, np.int64), np.zeros(0, np.float32), scale=1.0)
    assert np.isnan(cache.read(0, 0)[1]).all()


def test_observed_queries_are_the_last_ones_of_the_stream() -> None:
    cache = make(observed_queries=5)
    append(cache, 0, 0, 3, seed=1)
    queries, places = cache.observed(0)
    np.testing.assert_array_equal(queries, pairs(3, 1)[0])
    append(cache, 0, 3, 4, seed=2)
    queries, places = cache.observed(0)
    np.testing.assert_array_equal(places, [2, 3, 4, 5, 6])
    np.testing.assert_array_equal(queries, np.concatenate([pairs(3, 1)[0][2:], pairs(4, 2)[0]]))
    append(cache, 0, 7, 9, seed=3)
    np.testing.assert_array_equal(cache.observed(0)[0], pairs(9, 3)[0][-5:])
    assert cache.observed(1)[0].shape == (0, HEADS, SIZE)
    assert make().observed(0)[0].shape == (0, HEADS, SIZE)


# --- commit and rollback


@pytest.mark.parametrize("committed", [0, 1, PAGE - 1, PAGE, PAGE + 1])
@pytest.mark.parametrize("more", [1, PAGE - 1, PAGE, 2 * PAGE])
def test_rollback_after_some_layers_only(committed: int, more: int) -> None:
    cache, never = make(layers=3), make(layers=3)
    for each in (cache, never):
        if committed:
            fill(each, 3, committed)
    before, pool = snapshot(cache, 3), cache.pool_bytes
    append(cache, 0, committed, more, seed=9)
    append(cache, 1, committed, more, seed=9)  # a run that fails before layer 2
    cache.rollback()
    assert_same(snapshot(cache, 3), before)
    assert cache.pool_bytes == pool
    for layer in range(3):  # the conversation goes on as if nothing had happened
        np.testing.assert_array_equal(
            append(cache, layer, committed, 70, seed=4), append(never, layer, committed, 70, seed=4)
        )
    assert_same(snapshot(cache, 3), snapshot(never, 3))


def test_rollback_forgets_observed_queries_too() -> None:
    cache = make(observed_queries=4)
    fill(cache, 2, 10)
    before = cache.observed(0)
    append(cache, 0, 10, 2, seed=5)
    cache.rollback()
    np.testing.assert_array_equal(cache.observed(0)[1], before[1])
    np.testing.assert_array_equal(cache.observed(0)[0], before[0])


def test_commit_makes_it_last() -> None:
    cache = make()
    fill(cache, 2, 10)
    before = snapshot(cache)
    cache.rollback()
    assert_same(snapshot(cache), before)


def test_forgetting_everything_starts_over() -> None:
    cache = make(observed_queries=4)
    fill(cache, 2, 100)
    cache.forget_from(0)
    assert cache.pool_bytes == cache.bytes == 0
    assert [cache.tokens(0, 0), len(cache.observed(0)[1])] == [0, 0]
    np.testing.assert_array_equal(append(cache, 0, 0, 5), append(make(), 0, 0, 5))


# --- retain


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "kept",
    [
        [], [0], [129], list(range(130)), list(range(64)), list(range(65)), list(range(1, 130)),
        list(range(0, 130, 2)), [0, 1, 2, 3, 127, 128, 129], [63, 64],
    ],
)  # fmt: skip
def test_retain_keeps_what_it_says(storage: str, kept: list[int]) -> None:
    cache, twin = make(storage=storage), CacheReference(2, KV_HEADS, SIZE, FREQUENCIES, FACTOR)
    fill(cache, 2, 130)
    for layer in range(2):
        _, k, v = pairs(130, layer)
        twin.append(layer, k, v, np.arange(130))
    others = [*cache.read(0, 1), *cache.read(1, 0)]
    keys, values, places = cache.read(0, 0)
    cache.retain(0, 0, np.array(kept, np.int32))
    twin.retain(0, 0, kept)
    got = cache.read(0, 0)
    for array, before in zip(got, (keys, values, places), strict=True):
        np.testing.assert_array_equal(array, before[kept])
    compare(cache, twin, 0, 0, UNIT[storage])
    for left, right in zip([*cache.read(0, 1), *cache.read(1, 0)], others, strict=True):
        np.testing.assert_array_equal(left, right)
    assert cache.tokens(0, 0) == len(kept)
    assert cache.bytes == cache.pool_bytes == (-(-len(kept) // PAGE) + 9) * cache.page_bytes
    cache.rollback()  # what is kept is part of the conversation
    assert cache.tokens(0, 0) == len(kept)


@pytest.mark.parametrize("kept", [[-1], [130], [3, 3], [4, 2], [0, 2**31 - 1]])
def test_retain_refuses_what_is_not_there(kept: list[int]) -> None:
    cache = make()
    fill(cache, 2, 130)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="must ascend and lie inside"):
        cache.retain(0, 0, np.array(kept, np.int32))
    assert_same(snapshot(cache), before)


@pytest.mark.parametrize(("layer", "head"), [(2, 0), (0, 2), (-1, 0), (0, -1), (2**31 - 1, 0)])
def test_layers_and_heads_that_are_not_there(layer: int, head: int) -> None:
    cache = make()
    fill(cache, 2, 5)
    for use in (
        lambda: cache.retain(layer, head, np.zeros(1, np.int32)),
        lambda: cache.read(layer, head),
        lambda: cache.tokens(layer, head),
    ):
        with pytest.raises((ValueError, IndexError)):
            use()


# --- forks


@pytest.mark.parametrize("writer", ["parent", "child"])
@pytest.mark.parametrize("tokens", [1, PAGE - 1, PAGE, PAGE + 1])
def test_writes_after_a_fork_stay_private(writer: str, tokens: int) -> None:
    parent = make()
    fill(parent, 2, tokens)
    child = parent.fork()
    before = snapshot(parent)
    assert_same(snapshot(child), before)
    writes, keeps = (parent, child) if writer == "parent" else (child, parent)
    fill(writes, 2, 70, first=tokens, seed=7)
    writes.retain(0, 0, np.arange(1, tokens + 70, dtype=np.int32))
    assert_same(snapshot(keeps), before)
    alone = make()
    fill(alone, 2, tokens)
    fill(alone, 2, 30, first=tokens, seed=8)
    fill(keeps, 2, 30, first=tokens, seed=8)
    assert_same(snapshot(keeps), snapshot(alone))


def test_a_fork_costs_what_differs() -> None:
    parent = make()
    fill(parent, 2, 2 * PAGE + 1)
    page, heads = parent.page_bytes, 2 * KV_HEADS
    assert parent.pool_bytes == 3 * heads * page
    child = parent.fork()
    assert parent.pool_bytes == child.pool_bytes == 3 * heads * page
    assert parent.bytes == child.bytes == 3 * heads * page
    append(child, 0, 2 * PAGE + 1, 1)  # copies the last page of one layer's heads
    assert parent.pool_bytes == (3 * heads + KV_HEADS) * page
    append(child, 0, 2 * PAGE + 2, PAGE)  # and one new page for each
    assert parent.pool_bytes == (3 * heads + 2 * KV_HEADS) * page
    append(parent, 0, 2 * PAGE + 1, 1)  # the parent's pages are its own again: nothing is copied
    assert parent.pool_bytes == (3 * heads + 2 * KV_HEADS) * page
    child.close()
    assert parent.pool_bytes == 3 * heads * page
    assert parent.pool_peak_bytes == (3 * heads + 2 * KV_HEADS) * page


def test_a_fork_outlives_its_parent() -> None:
    parent = make()
    fill(parent, 2, 100)
    child = parent.fork()
    grandchild = child.fork()
    before = snapshot(parent)
    parent.close()
    child.close()
    assert_same(snapshot(grandchild), before)
    fill(grandchild, 2, 5, first=100)
    grandchild.close()


def test_rollback_of_a_fork_leaves_the_parent_alone() -> None:
    parent = make()
    fill(parent, 2, 40)
    child = parent.fork()
    before = snapshot(parent)
    append(child, 0, 40, 100)
    child.rollback()
    assert_same(snapshot(child), before)
    assert_same(snapshot(parent), before)


# --- limits and closing


def test_a_limit_is_an_error_and_the_cache_stays_usable() -> None:
    page = make().page_bytes
    cache = make(limit_bytes=5 * page)
    fill(cache, 2, PAGE)  # 4 pages
    before = snapshot(cache)
    with pytest.raises(RuntimeError, match=f"more than its limit of {5 * page} bytes"):
        append(cache, 0, PAGE, 10)  # two heads: 2 more pages
    cache.rollback()
    assert_same(snapshot(cache), before)
    assert cache.pool_bytes == 4 * page
    cache.retain(0, 0, np.arange(10, dtype=np.int32))
    cache.retain(0, 1, np.arange(10, dtype=np.int32))
    append(cache, 0, PAGE, 10)
    assert cache.pool_peak_bytes <= 5 * page


def test_forks_share_the_limit() -> None:
    page = make().page_bytes
    parent = make(limit_bytes=6 * page)
    fill(parent, 2, 10)
    child = parent.fork()
    append(child, 0, 10, 1)
    with pytest.raises(RuntimeError, match="more than its limit"):
        append(child, 1, 10, 2 * PAGE)
    child.rollback()
    child.close()
    append(parent, 0, 10, 1)


def test_retain_on_shared_pages_at_the_limit() -> None:
    """Copying a shared page needs room: where there is none, an error that says so, and nothing half-done."""
    page = make(layers=1).page_bytes
    parent = make(layers=1, limit_bytes=4 * page)
    fill(parent, 1, 2 * PAGE)
    child = parent.fork()
    before = snapshot(parent, 1)
    with pytest.raises(RuntimeError, match="more than its limit"):
        child.retain(0, 0, np.arange(0, 2 * PAGE, 2, dtype=np.int32))
    assert_same(snapshot(parent, 1), before)
    assert_same(snapshot(child, 1), before)


def test_using_a_closed_cache_is_an_error() -> None:
    cache = make()
    fill(cache, 2, 5)
    cache.close()
    cache.close()
    assert cache.closed
    for use in (
        lambda: append(cache, 0, 5, 1), cache.fork, cache.commit, cache.rollback, lambda: cache.forget_from(0),
        lambda: cache.tokens(0, 0), lambda: cache.read(0, 0), lambda: cache.observed(0),
        lambda: cache.retain(0, 0, np.zeros(0, np.int32)), lambda: cache.bytes, lambda: cache.pool_bytes,
        lambda: cache.page_bytes,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            use()


def test_handles_are_never_used_twice() -> None:
    first = make()
    number = first.handle
    first.close()
    assert make().handle != number


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "heads must be|layers"),
        ({"layers": -1}, "heads must be|layers"),
        ({"heads": 3}, "multiple of kv_heads"),
        ({"heads": 0}, "multiple of kv_heads"),
        ({"kv_heads": 0}, "multiple of kv_heads"),
        ({"kv_heads": -2}, "multiple of kv_heads"),
        ({"head_size": 0}, "multiple of 16"),
        ({"head_size": 24}, "multiple of 16"),
        ({"head_size": 272}, "at most 256"),
        ({"storage": "fp16"}, "'fp16' is not one of fp32, bf16"),
    ],
)
def test_hostile_shapes(change: dict[str, Any], message: str) -> None:
    shape = {"layers": 1, "heads": 2, "kv_heads": 2, "head_size": 16, **change}
    with pytest.raises(ValueError, match=message):
        kernels.KVCache(**shape)


def test_closing_gives_the_memory_back_at_once() -> None:
    """64 MB of pages; a handle that Python still holds does not hold them."""
    process = psutil.Process()
    cache = kernels.KVCache(layers=4, heads=2, kv_heads=2, head_size=256)
    tokens = 4096
    ones = np.ones((tokens, 2, 256), np.float32)
    for layer in range(4):
        cache.attend(layer, ones[:1], ones[:1], ones[:1], np.zeros(1, np.int64), np.zeros(0, np.float32), scale=1.0)
    for layer in range(4):  # a window of 1: no time goes into attention
        cache.attend(layer, ones, ones, ones, np.arange(1, tokens + 1), np.zeros(0, np.float32), scale=1.0, window=1)
    size, before = cache.pool_bytes, process.memory_info().rss
    assert size > 64 << 20
    del ones
    gc.collect()
    held = process.memory_info().rss
    cache.close()
    after = process.memory_info().rss
    assert held - after > 0.95 * size, f"{before - after} of {size} bytes came back"


def test_closing_while_another_thread_computes_is_safe() -> None:
    """In a process of its own: what could happen is a crash."""
    code = """
import threading, numpy as np
from satchel import kernels
zeros = np.zeros((3000, 2, 64), np.float32)
for attempt in range(4):
    cache = kernels.KVCache(layers=1, heads=2, kv_heads=2, head_size=64)
    begun = threading.Event()
    def work():
        begun.set()
        try:
            cache.attend(0, zeros, zeros, zeros, np.arange(3000), np.zeros(0, np.float32), scale=1.0)
        except ValueError:
            pass
    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    threading.Event().wait(0.01)
    cache.close()
    thread.join()
print("survived")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "survived"), done.stderr[-500:]


# --- random conversations


@dataclass
class Branch:
    """A native cache and its twin, committed and not."""

    cache: kernels.KVCache
    twin: CacheReference
    committed: list[list[int]]  # tokens per layer and head
    position: int
    pending: set[int] = field(default_factory=set)  # layers that the unfinished run has reached


def copy_twin(twin: CacheReference) -> CacheReference:
    copy = CacheReference(twin.layers, twin.kv_heads, twin.head_size, twin.rope_frequencies, twin.attention_factor)
    copy.heads = [list(layer) for layer in twin.heads]
    return copy


class Conversation:
    """Random operations on a family of forks, each mirrored in the twin; everything is compared at the end."""

    LAYERS = 2

    def __init__(self, seed: int, storage: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.unit = UNIT[storage]
        cache = make(layers=self.LAYERS, storage=storage, threads=int(self.rng.integers(1, 4)))
        twin = CacheReference(self.LAYERS, KV_HEADS, SIZE, FREQUENCIES, FACTOR)
        nothing = [[0] * KV_HEADS for _ in range(self.LAYERS)]
        self.branches = [Branch(cache, twin, nothing, 0)]
        self.log: list[str] = []

    def step(self) -> None:
        index = int(self.rng.integers(len(self.branches)))
        branch = self.branches[index]
        moves = ["append", "append", "rollback", "commit", "commit"]
        if not branch.pending:
            moves += ["retain", "retain", "fork"]
            if len(self.branches) > 1:
                moves.append("close")
        move = str(self.rng.choice(moves))
        self.log.append(f"{move} {index}")
        getattr(self, move)(branch)

    def append(self, branch: Branch) -> None:
        layer = int(self.rng.integers(self.LAYERS))
        if layer in branch.pending:
            return
        tokens = int(self.rng.choice([1, 3, 16, 63, 64, 65, 100]))
        q, k, v = pairs(tokens, int(self.rng.integers(1 << 30)))
        places = branch.position + np.arange(tokens)
        got = branch.cache.attend(
            layer, q, k, v, places, FREQUENCIES, scale=0.3, attention_factor=FACTOR, threads=2
        )
        branch.twin.append(layer, k, v, places)
        expected, _ = branch.twin.attention(layer, q, places, scale=0.3)
        np.testing.assert_allclose(got, expected, atol=60 * self.unit + 1e-5, err_msg=str(self.log))
        branch.pending.add(layer)

    def commit(self, branch: Branch) -> None:
        branch.cache.commit()
        branch.pending.clear()
        held = [branch.twin.tokens(layer, head) for layer in range(self.LAYERS) for head in range(KV_HEADS)]
        branch.committed = np.reshape(held, (self.LAYERS, KV_HEADS)).tolist()
        branch.position += 100

    def rollback(self, branch: Branch) -> None:
        branch.cache.rollback()
        branch.pending.clear()
        for layer in range(self.LAYERS):
            for head in range(KV_HEADS):
                branch.twin.retain(layer, head, np.arange(branch.committed[layer][head]))

    def retain(self, branch: Branch) -> None:
        layer, head = int(self.rng.integers(self.LAYERS)), int(self.rng.integers(KV_HEADS))
        held = branch.twin.tokens(layer, head)
        kept = np.flatnonzero(self.rng.random(held) < self.rng.choice([0.0, 0.3, 0.9, 1.1]))
        branch.cache.retain(layer, head, kept.astype(np.int32))
        branch.twin.retain(layer, head, kept)
        branch.committed[layer][head] = len(kept)

    def fork(self, branch: Branch) -> None:
        if len(self.branches) < 5:
            twin, committed = copy_twin(branch.twin), [list(layer) for layer in branch.committed]
            self.branches.append(Branch(branch.cache.fork(), twin, committed, branch.position))

    def close(self, branch: Branch) -> None:
        branch.cache.close()
        self.branches = [other for other in self.branches if other is not branch]

    def check(self) -> None:
        for branch in self.branches:
            for layer in range(self.LAYERS):
                for head in range(KV_HEADS):
                    compare(branch.cache, branch.twin, layer, head, self.unit)
        assert self.branches[0].cache.pool_bytes <= sum(branch.cache.bytes for branch in self.branches)
        for branch in self.branches[1:]:
            branch.cache.close()
        assert self.branches[0].cache.pool_bytes == self.branches[0].cache.bytes  # no page was lost


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(12))
def test_random_conversations(storage: str, seed: int) -> None:
    conversation = Conversation(seed, storage)
    for _ in range(60):
        conversation.step()
    conversation.check()


def test_the_random_checker_notices() -> None:
    conversation = Conversation(3, "fp32")
    for _ in range(30):
        conversation.step()
    branch = conversation.branches[0]
    if branch.pending:
        conversation.commit(branch)
    held = branch.twin.heads[0][0]
    if not len(held.positions):
        conversation.append(branch)
        held = branch.twin.heads[0][0]
    branch.twin.heads[0][0] = reference.HeadReference(
        held.raw_keys, held.keys, held.values, held.positions + 1, held.retention
    )
    with pytest.raises(AssertionError):
        conversation.check()
