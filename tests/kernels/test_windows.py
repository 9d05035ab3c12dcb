"""Layers with a window hold their window and no more, and nobody can tell: bit for bit as if nothing was dropped."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from satchel import kernels
from satchel.cache import WINDOW_SLACK, ArchiveOptions

Array = NDArray[Any]
PAGE, SLACK = kernels.PAGE_TOKENS, WINDOW_SLACK
HEADS, KV_HEADS, SIZE = 4, 2, 16
FREQUENCIES = (100.0 ** (-np.arange(6) / 6)).astype(np.float32)
ARCHIVE = ArchiveOptions(codec="q8", retriever="landmark", sinks=16, window=64, recall_tokens=64, recall_every=1,
                         reach=0, warm_bytes=1 << 30)  # fmt: skip


class Talk:
    """A cache that trims its layers (or not, and is only asked to look no farther), and how much it has read."""

    def __init__(self, windows: tuple[int, ...], *, trims: bool, **options: Any) -> None:
        self.windows = windows
        self.cache = kernels.KVCache(
            layers=len(windows), heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, windows=windows if trims else (),
            **options,
        )  # fmt: skip
        self.position = 0

    def run(self, tokens: int, seed: int = 0) -> Array:
        """One graph run, not yet committed: the outputs of all layers."""
        rng = np.random.default_rng((seed, self.position))
        places = np.arange(self.position, self.position + tokens)
        outs = []
        for layer, window in enumerate(self.windows):
            q, k, v = (
                rng.normal(size=(tokens, heads, SIZE)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            outs.append(self.cache.attend(layer, q, k, v, places, FREQUENCIES, scale=0.5, window=window))
        return np.stack(outs)

    def read(self, tokens: int, seed: int = 0) -> Array:
        outs = self.run(tokens, seed)
        self.cache.commit()
        self.position += tokens
        return outs

    def forget_from(self, position: int) -> None:
        self.cache.forget_from(position)
        self.position = position

    def fork(self) -> Talk:
        twin = object.__new__(Talk)
        twin.windows, twin.position, twin.cache = self.windows, self.position, self.cache.fork()
        return twin

    def positions(self, layer: int) -> list[int]:
        held = [self.cache.positions(layer, head).tolist() for head in range(KV_HEADS)]
        assert held[0] == held[1]
        return held[0]

    def state(self) -> list[Array]:
        return [
            array for layer in range(len(self.windows)) for head in range(KV_HEADS)
            for array in self.cache.read(layer, head)
        ]  # fmt: skip

    def check_newest(self) -> None:
        for layer in range(len(self.windows)):
            held = self.positions(layer)
            assert held == list(range(self.position - len(held), self.position))

    def check_holds(self) -> None:
        """The newest tokens without a gap: no fewer than may be asked for, no more than whole pages make it."""
        self.check_newest()
        for layer, window in enumerate(self.windows):
            held = self.positions(layer)
            if window:
                assert min(self.position, window - 1 + SLACK) <= len(held) <= window + SLACK + PAGE - 2


def pair(windows: tuple[int, ...], **options: Any) -> tuple[Talk, Talk]:
    return Talk(windows, trims=True, **options), Talk(windows, trims=False, **options)


def check_equal(one: Talk, other: Talk, chunks: tuple[int, ...] = (1, 70, 1, 1, 130, 1), seed: int = 0) -> None:
    for tokens in chunks:
        np.testing.assert_array_equal(one.read(tokens, seed), other.read(tokens, seed))


def refused(talk: Talk, position: int) -> None:
    before = talk.state()
    with pytest.raises(RuntimeError, match=rf"cannot go back to position {position}: layers with a window of"):
        talk.cache.forget_from(position)
    for mine, theirs in zip(talk.state(), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


# --- what is seen


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
@pytest.mark.parametrize("window", [1, 63, 64, 65, 100, 128])
def test_what_left_the_window_is_not_missed(window: int, chunk: int, storage: str) -> None:
    trimmed, whole = pair((window, 0, window + 1), storage=storage, observed_queries=3)
    for _ in range(0, 420, chunk):
        np.testing.assert_array_equal(trimmed.read(chunk), whole.read(chunk))
        trimmed.check_holds()
    assert len(trimmed.positions(1)) == trimmed.position
    assert trimmed.cache.bytes < whole.cache.bytes


@pytest.mark.parametrize("window", [64, 100])
@pytest.mark.parametrize("back", [-1, 0, 1])
def test_the_edge_of_the_window(window: int, back: int) -> None:
    """From first principles: a query sees the token ``window - 1`` before it, and not the one before that."""
    talk = Talk((window,), trims=True)
    places = np.arange(500)
    keys, values = (np.random.default_rng(seed).normal(size=(500, 1, SIZE)).astype(np.float32) for seed in (1, 2))
    both = [np.repeat(each, KV_HEADS, axis=1) for each in (keys, values)]
    nothing = np.zeros(0, np.float32)
    for first in range(0, 499, 100):
        some = slice(first, min(first + 100, 499))
        q = np.zeros((some.stop - first, HEADS, SIZE), np.float32)
        talk.cache.attend(0, q, both[0][some], both[1][some], places[some], nothing, scale=1.0, window=window)
        talk.cache.commit()
    query = np.full((1, HEADS, SIZE), 0.3, np.float32)
    out = talk.cache.attend(0, query, both[0][499:], both[1][499:], places[499:], nothing, scale=1.0, window=window)
    seen = slice(500 - window - back, 500)
    weights = np.exp(keys[seen, 0] @ query[0, 0])
    expected = weights @ values[seen, 0] / weights.sum()
    assert np.allclose(out[0, 0], expected, atol=1e-5) == (back == 0)


def test_twice_the_text_takes_no_more() -> None:
    sizes = []
    for tokens in (640, 1280):
        talk = Talk((100, 100), trims=True)
        for _ in range(tokens // 64):
            talk.read(64)
        sizes.append((talk.cache.bytes, talk.cache.pool_bytes, talk.cache.layer_bytes(0)))
    assert sizes[0] == sizes[1]
    assert sizes[0][0] == sizes[0][1]


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_a_windowed_layer(threads: int) -> None:
    trimmed, whole = pair((300, 0), threads=threads)
    for tokens in (500, 1, 200, 1, 1):
        np.testing.assert_allclose(trimmed.read(tokens), whole.read(tokens), atol=1e-5)


# --- forks, rollback, forgetting


@pytest.mark.parametrize("branch_first", [True, False])
def test_forks(branch_first: bool) -> None:
    trimmed, whole = pair((100, 0, 40))
    check_equal(trimmed, whole, (300,))
    page = trimmed.cache.pool_bytes
    twin, whole_twin = trimmed.fork(), whole.fork()
    assert trimmed.cache.pool_bytes == page
    order = [(twin, whole_twin), (trimmed, whole)]
    for seed, (one, other) in enumerate(order if branch_first else order[::-1]):
        check_equal(one, other, seed=seed)
        one.check_holds()
    check_equal(*order[0], seed=5)
    twin.cache.close()
    assert trimmed.cache.pool_bytes == trimmed.cache.bytes


@pytest.mark.parametrize("tokens", [1, 64, 400])
def test_a_run_that_did_not_happen(tokens: int) -> None:
    trimmed, whole = pair((100, 0, 40))
    check_equal(trimmed, whole, (250, 1))
    trimmed.run(tokens, seed=9)
    trimmed.cache.rollback()
    check_equal(trimmed, whole)


@pytest.mark.parametrize("back", [1, 63, 64])
@pytest.mark.parametrize("tokens", [64, 100, 227, 228, 300, 389])
def test_a_few_tokens_are_forgotten(tokens: int, back: int) -> None:
    trimmed, whole = pair((100, 0, 64))
    check_equal(trimmed, whole, (tokens // 2, tokens - tokens // 2))
    for talk in (trimmed, whole):
        talk.forget_from(tokens - back)
    check_equal(trimmed, whole, seed=1)
    trimmed.check_holds()


def test_more_than_is_held_is_not_forgotten() -> None:
    talk = Talk((100, 0), trims=True)
    least = 0
    for tokens in range(1, 400):
        talk.read(1)
        first = talk.positions(0)[0]
        if first:
            refused(talk, first + 98)
            refused(talk, 1)
            least = max(least, tokens - (first + 98))
        branch = talk.fork()
        branch.forget_from(max(first + 99, 1) if first else 1)
    assert SLACK < least <= SLACK + PAGE
    talk.forget_from(0)
    assert talk.cache.bytes == 0
    check_equal(talk, Talk((100, 0), trims=False))


def test_forgetting_twice_needs_the_window_twice() -> None:
    trimmed, whole = pair((100,))
    check_equal(trimmed, whole, (400,))
    for talk in (trimmed, whole):
        talk.forget_from(350)
    refused(trimmed, 250)
    for talk in (trimmed, whole):
        talk.forget_from(340)
    check_equal(trimmed, whole, seed=3)


# --- marks


@pytest.mark.parametrize("question", [(1,), (64,), (100, 100, 7), (500, 300)])
@pytest.mark.parametrize("document", [1, 63, 64, 100, 300, 391])
def test_a_mark_is_a_way_back(document: int, question: tuple[int, ...]) -> None:
    trimmed, whole = pair((100, 0, 64))
    check_equal(trimmed, whole, (document,))
    before, size = trimmed.state(), trimmed.cache.pool_bytes
    trimmed.cache.mark()
    check_equal(trimmed, whole, question, seed=1)
    assert trimmed.cache.pool_bytes == trimmed.cache.bytes  # what the mark keeps is counted
    for talk in (trimmed, whole):
        talk.forget_from(document)
    for mine, theirs in zip(trimmed.state(), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert trimmed.cache.pool_bytes == trimmed.cache.bytes == size
    check_equal(trimmed, whole, seed=2)


def test_a_mark_reaches_as_far_back_as_the_cache_did() -> None:
    trimmed, whole = pair((100, 0))
    check_equal(trimmed, whole, (391,))
    trimmed.cache.mark()
    check_equal(trimmed, whole, (600,))
    for talk in (trimmed, whole):
        talk.forget_from(391 - SLACK)
    check_equal(trimmed, whole, seed=1)


def test_behind_a_mark_the_newest_tokens_count() -> None:
    trimmed, whole = pair((100, 0))
    check_equal(trimmed, whole, (391,))
    trimmed.cache.mark()
    check_equal(trimmed, whole, (600,))
    for talk in (trimmed, whole):
        talk.forget_from(980)
    refused(trimmed, 700)
    for talk in (trimmed, whole):  # which has not spent the mark
        talk.forget_from(391)
    check_equal(trimmed, whole, seed=1)


def test_a_mark_that_is_released_is_gone() -> None:
    talk = Talk((100, 0), trims=True)
    talk.read(300)
    talk.cache.mark()
    talk.read(500)
    branch = talk.fork()
    refused(branch, 300)  # a fork has no mark
    branch.cache.close()
    held = talk.cache.pool_bytes
    talk.cache.release_mark()
    talk.cache.release_mark()
    assert talk.cache.pool_bytes == talk.cache.bytes < held
    refused(talk, 300)


def test_a_mark_forgets_what_was_left_half_done() -> None:
    trimmed, whole = pair((100, 0))
    check_equal(trimmed, whole, (200,))
    trimmed.run(90, seed=4)
    trimmed.cache.mark()
    check_equal(trimmed, whole, (300,))
    for talk in (trimmed, whole):
        talk.forget_from(200)
    check_equal(trimmed, whole, seed=1)


def test_a_mark_of_an_empty_cache() -> None:
    talk = Talk((100, 0), trims=True)
    talk.cache.mark()
    talk.read(500)
    talk.forget_from(0)
    check_equal(talk, Talk((100, 0), trims=False))


# --- an archive beside them


def archive_both(talks: tuple[Talk, Talk], until: int) -> None:
    """The windowed layers of the untrimmed cache need their window hot; the others are alike."""
    for talk in talks:
        talk.cache.archive(until)
        talk.cache.drop_archived()


@pytest.mark.parametrize("retriever", ["landmark", "channels"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_recall(chunk: int, retriever: str) -> None:
    windows = (40, 0, 100, 0, 40)
    archive = replace(ARCHIVE, retriever=retriever).native(SIZE)
    trimmed, whole = pair(windows, archive=archive)
    archived = 0
    for _ in range(0, 700, chunk):
        np.testing.assert_array_equal(trimmed.read(chunk), whole.read(chunk))
        until = (trimmed.position - 170) // 64 * 64
        if until > archived:
            archive_both((trimmed, whole), until)
            archived = until
    assert trimmed.cache.archived_until >= 448
    usage, more = trimmed.cache.archive_usage(), whole.cache.archive_usage()
    for tier in ("warm_bytes", "digest_bytes", "sink_bytes"):  # two layers of five
        assert usage[tier] * 5 == more[tier] * 2 > 0
    for layer in (1, 3):
        assert trimmed.cache.recalled(layer, 0) == whole.cache.recalled(layer, 0)
        for mine, theirs in zip(trimmed.cache.read_archive(layer, 1), whole.cache.read_archive(layer, 1), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for use in (trimmed.cache.recalled, trimmed.cache.read_archive, trimmed.cache.archive_order):
        with pytest.raises(ValueError, match="no such archive"):
            use(0, 0)


def test_forgetting_with_an_archive() -> None:
    """What was archived meanwhile comes back as far as the archive's window, and windowed layers from the mark."""
    talk = Talk((40, 0, 100), trims=True, archive=ARCHIVE.native(SIZE))
    talk.read(400)
    talk.cache.archive(192)
    talk.cache.drop_archived()
    for marked in (False, True):
        before = talk.state()
        if marked:
            talk.cache.mark()
        talk.read(300)
        talk.cache.archive(512)
        talk.cache.drop_archived()
        if not marked:
            refused(talk, 400)
            assert talk.cache.archived_until == 512  # not even the archive
            talk.forget_from(0)
            talk.read(400)
            talk.cache.archive(192)
            talk.cache.drop_archived()
    talk.forget_from(400)
    per_layer = 3 * KV_HEADS
    for layer in (0, 2):
        part = slice(layer * per_layer, (layer + 1) * per_layer)
        for mine, theirs in zip(talk.state()[part], before[part], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert talk.positions(1) == list(range(talk.cache.archived_until, 400))
    talk.read(20)
    talk.check_newest()


def test_scores_are_of_the_layers_that_are_archived() -> None:
    talk = Talk((40, 0, 40), trims=True, archive=replace(ARCHIVE, codec="mikv").native(SIZE))
    talk.read(300)
    with pytest.raises(ValueError, match="layers that see everything"):
        talk.cache.archive(64, np.zeros((3, KV_HEADS, 4), np.float32))
    talk.cache.archive(64, np.zeros((1, KV_HEADS, 4), np.float32))


# --- as bytes

WINDOWS = (40, 0, 100)


def payload(talk: Talk, layer: int) -> bytes:
    cells = talk.cache.archived_until // 64
    if talk.windows[layer] or not cells:
        assert talk.cache.payload_bytes(layer) == 0
        return b""
    return b"".join(talk.cache.read_payload(layer, head, 0, cells) for head in range(KV_HEADS))


def restored(
    talk: Talk, blobs: list[bytes], file: Path, *, windows: tuple[int, ...] = WINDOWS, **options: Any
) -> Talk:
    file.write_bytes(b"".join(payload(talk, layer) for layer in range(len(WINDOWS))))
    twin = object.__new__(Talk)
    with file.open("rb") as opened:
        twin.cache = kernels.KVCache.restored(
            layers=len(WINDOWS), heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, windows=windows, blobs=blobs,
            tokens=talk.position, descriptor=opened.fileno(), payload_offsets=[2**64 - 1, 0, 2**64 - 1], **options,
        )  # fmt: skip
    twin.windows, twin.position = windows, talk.position
    return twin


def saved(archived: bool, tokens: int = 450) -> tuple[Talk, list[bytes], dict[str, Any]]:
    options = {"archive": ARCHIVE.native(SIZE) if archived else None, "observed_queries": 4}
    talk = Talk(WINDOWS, trims=True, **options)
    talk.read(tokens)
    if archived:
        talk.cache.archive((tokens - 64) // 64 * 64)
        talk.cache.drop_archived()
    talk.read(1)
    return talk, [talk.cache.save_layer(layer) for layer in range(len(WINDOWS))], options


@pytest.mark.parametrize("archived", [True, False])
def test_saved_and_restored(archived: bool, tmp_path: Path) -> None:
    talk, blobs, options = saved(archived)
    longer = saved(archived, 450 + 512)[1]
    for layer in (0, 2):
        assert len(blobs[layer]) == len(longer[layer])
    twin = restored(talk, blobs, tmp_path / "file", **options)
    assert [twin.cache.save_layer(layer) for layer in range(3)] == blobs
    assert twin.cache.archive_usage() == talk.cache.archive_usage()
    refused(twin, 300)
    for one in (talk, twin):
        one.forget_from(451 - SLACK)
    check_equal(twin, talk)
    with pytest.raises(ValueError, match="no such cells"):
        talk.cache.read_payload(0, 0, 0, 1)


def test_a_layer_with_a_window_has_no_archive(tmp_path: Path) -> None:
    talk, blobs, options = saved(archived=True)
    for other in ((0, 0, 100), (0, 0, 0), (0, 40, 100)):
        with pytest.raises(ValueError, match="damaged"):
            restored(talk, blobs, tmp_path / "file", windows=other, **options)


@pytest.mark.parametrize("missing", ["first", "last", "middle"])
def test_the_window_must_be_whole(missing: str, tmp_path: Path) -> None:
    """Beside an archive nothing is ever pruned from it; a budget that forgets may do so."""
    for archived in (True, False):
        talk, _, options = saved(archived)
        held = talk.positions(2)
        first = held.index(talk.position - 99)  # what the next query sees first
        some = {"first": held[: first + 1], "last": held[-1:], "middle": [420]}[missing]
        index = np.array([place for place, each in enumerate(held) if each not in some], np.int32)
        talk.cache.retain_layer(2, np.tile(index, (KV_HEADS, 1)))
        blobs = [talk.cache.save_layer(layer) for layer in range(3)]
        if archived:
            with pytest.raises(ValueError, match="tokens are missing in a layer's window"):
                restored(talk, blobs, tmp_path / "file", **options)
        else:
            restored(talk, blobs, tmp_path / "file", **options).read(3)


@pytest.mark.parametrize("archived", [True, False])
@pytest.mark.parametrize("layer", [0, 2])
def test_mutations_are_refused_or_harmless(layer: int, archived: bool, tmp_path: Path) -> None:
    talk, blobs, options = saved(archived)
    rng, used = random.Random(layer), 0
    for _ in range(500):
        blob = bytearray(blobs[layer])
        for _ in range(rng.randint(1, 3)):
            at = rng.choice((rng.randrange(20), rng.randrange(400), rng.randrange(len(blob) // 4))) * 4
            value = rng.choice((0, 1, 63, 64, 65, 449, 450, 451, 2**31 - 1, 2**31, 2**32 - 1, rng.getrandbits(32)))
            blob[at : at + 4] = value.to_bytes(4, "little")
        changed = [*blobs[:layer], bytes(blob), *blobs[layer + 1 :]]
        try:
            twin = restored(talk, changed, tmp_path / "file", **options)
        except ValueError:
            continue
        used += 1
        with np.errstate(all="ignore"):
            for tokens in (1, 20):
                twin.read(tokens)
            for position in (440, 300, 90, 0):
                try:
                    twin.forget_from(position)
                except RuntimeError:
                    continue
                twin.read(1)
        twin.cache.close()
    assert 20 < used < 490
    for length in (*range(0, len(blobs[layer]), 997), len(blobs[layer]) - 1, len(blobs[layer]) + 1):
        changed = [*blobs[:layer], (blobs[layer] + b"\0")[:length], *blobs[layer + 1 :]]
        with pytest.raises(ValueError, match="damaged"):
            restored(talk, changed, tmp_path / "file", **options)


# --- what is refused


@pytest.mark.parametrize(
    ("windows", "message"),
    [((1,), "one number for each layer"), ((1, 2, 3), "one number for each layer"), ((-1, 0), "not be negative")],
)
def test_hostile_windows(windows: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.KVCache(layers=2, heads=2, kv_heads=2, head_size=16, windows=windows)


def test_nothing_to_archive() -> None:
    with pytest.raises(ValueError, match="no layer sees everything"):
        Talk((5, 7), trims=True, archive=ARCHIVE.native(SIZE))


def test_a_layer_has_one_window() -> None:
    talk = Talk((5, 0), trims=True)
    talk.windows = (6, 0)
    with pytest.raises(ValueError, match="another window"):
        talk.run(1)
