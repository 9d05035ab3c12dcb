"""The KV cache of one conversation: the native pages, and the budget that they are pruned to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..errors import SnapshotError, StorageError
from .archive import BLOCK_TOKENS, ArchiveOptions, round_up
from .codecs import find_codec
from .forgetting import prune_layer
from .head_profiles import StreamingHeads
from .ranking import Ranking
from .scorers import find_scorer
from .settings import CacheSettings
from .snapshots.snapshot import Snapshot
from .snapshots.state import SectionToWrite, layer_sections, restored_native, saved_bytes, total_tokens_of

WINDOW_SLACK = 64  # as kernels/native/kv_cache.h has it
FULL_MESSAGE = "KV cache needs more than its limit"  # of the native code, which can raise nothing but text


class CacheFullError(Exception):
    """The pages' byte limit is reached, or what would have to be held was forgotten. For the runtime, which knows
    what to advise."""


@dataclass(frozen=True)
class CacheShape:
    """What a model's cache looks like: L layers, H query heads, KV key-value heads of size D.

    ``windows`` [L]: how many tokens each layer sees, the query's own included; 0: everything. Empty: no layer has one.
    ``streaming``: KV heads that see sinks and a window, in layers without a window of their own; None: no head does.
    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    windows: tuple[int, ...] = ()
    streaming: StreamingHeads | None = None

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Those with heads that see everything: what these forget must be kept elsewhere, or is missed."""
        return tuple(layer for layer in range(self.layers) if self.full_heads(layer))

    def full_heads(self, layer: int) -> tuple[int, ...]:
        """The KV heads of a layer that see everything."""
        if self.window(layer):
            return ()
        marks = self.streaming.heads[layer] if self.streaming else (False,) * self.kv_heads
        return tuple(head for head, streams in enumerate(marks) if not streams)

    def window(self, layer: int) -> int:
        """Of a layer; 0: none."""
        return self.windows[layer] if self.windows else 0


@dataclass(frozen=True)
class KVUsage:
    """Where the pairs of a conversation are now.

    ``hot_bytes``: pages, sinks and what is recalled from disk; ``warm_bytes``, ``cold_bytes``: the archive in memory
    and on disk; ``digest_bytes``: what finds its blocks; ``lost_tokens``: neither memory nor disk had room for them.
    """

    hot_bytes: int
    hot_tokens: int
    total_tokens: int
    warm_bytes: int = 0
    cold_bytes: int = 0
    digest_bytes: int = 0
    lost_tokens: int = 0
    flash_bytes_read: int = 0

    @property
    def memory_bytes(self) -> int:
        """All that is in memory."""
        return self.hot_bytes + self.warm_bytes + self.digest_bytes

    def to_json(self) -> dict[str, int]:
        return {
            "hot_bytes": self.hot_bytes,
            "warm_bytes": self.warm_bytes,
            "cold_bytes": self.cold_bytes,
            "digest_bytes": self.digest_bytes,
            "hot_tokens": self.hot_tokens,
            "total_tokens": self.total_tokens,
            "lost_tokens": self.lost_tokens,
            "flash_bytes_read": self.flash_bytes_read,
        }


class KVCache:
    """An owned cache: closing it frees its memory at once; a fork shares pages until one of the two writes.

    ``hot_tokens`` None keeps everything, until one is set; with it `demote` leaves that many per KV head: the sinks,
    the window and the best-scored others. With an ``archive`` nothing is forgotten: what `demote` removes is kept
    there, and recalled when a query needs it.

    Layers with a window are no part of this: they hold their window, and up to 127 tokens before it, however long the
    text is. Only a budget that forgets, and that is shorter than a layer's window, holds for that layer as well.
    Streaming heads hold their sinks beside that; no budget is shorter.
    """

    def __init__(
        self,
        shape: CacheShape,
        settings: CacheSettings,
        *,
        hot_tokens: int | None,
        threads: int = 1,
        limit_bytes: int = 0,
        archive: ArchiveOptions | None = None,
    ) -> None:
        self._shape = shape
        self._settings = settings
        scorer = find_scorer(settings.scorer)
        self._ranking = Ranking(scorer, shape.kv_heads, shape.head_size, shape.scale)
        self._threads = threads
        self._archive = archive
        self.hot_tokens = hot_tokens
        self.total_tokens = 0
        self._options: dict[str, Any] = {
            "layers": shape.layers,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_size": shape.head_size,
            "storage": settings.storage,
            "threads": threads,
            "observed_queries": scorer.observed_queries,  # kept even with no budget: one may come later
            "limit_bytes": limit_bytes,
            "archive": archive.native(shape.head_size) if archive else None,
            "windows": shape.windows,
            "retention": scorer.needs_retention,
            "streaming": shape.streaming.native() if shape.streaming else None,
        }
        self._native = kernels.KVCache(**self._options)

    @classmethod
    def restored(
        cls,
        shape: CacheShape,
        settings: CacheSettings,
        snapshot: Snapshot,
        *,
        hot_tokens: int | None,
        threads: int = 1,
        limit_bytes: int = 0,
        archive: ArchiveOptions | None = None,
    ) -> KVCache:
        """The cache whose `sections` and `snapshot_extra` were saved, with the same shape and settings (limits may
        differ). It goes on exactly as the saved one would have.

        All checksums are checked first. What the archive's ``warm_bytes`` has no room for stays in the snapshot's file,
        which the cache keeps open and protected from removal; ``snapshot`` itself may be closed.

        Raises:
            SnapshotError: it is damaged, or of another model or settings.
            CacheFullError: its hot pages need more than ``limit_bytes``, or the disk failed.
        """
        try:
            cache = cls(
                shape, settings, hot_tokens=hot_tokens, threads=threads, limit_bytes=limit_bytes, archive=archive
            )
            cache.total_tokens = total_tokens_of(snapshot)
            cache._ranking.restore(snapshot, shape.layers, cache.total_tokens)
            cache._native = restored_native(snapshot, cache._options, cache.total_tokens, shape.full_layers)
        except RuntimeError as error:
            raise CacheFullError(str(error)) from None
        except ValueError as error:  # settings that came with the snapshot
            raise SnapshotError(f"the snapshot {snapshot.path} cannot be used: {error}; remove the file") from None
        return cache

    @property
    def handle(self) -> int:
        """Names this cache in the graph's ``cache`` input."""
        return self._native.handle

    @property
    def closed(self) -> bool:
        return self._native.closed

    @property
    def shape(self) -> CacheShape:
        """As it was made with."""
        return self._shape

    @property
    def settings(self) -> CacheSettings:
        """As it was made with."""
        return self._settings

    @property
    def archive_options(self) -> ArchiveOptions | None:
        """As it was made with; None: what leaves the hot tier is forgotten."""
        return self._archive

    @property
    def recalls(self) -> bool:
        """Whether what leaves the hot tier is kept in an archive."""
        return self._archive is not None

    def close(self) -> None:
        """Frees the memory; using the cache afterwards is an error."""
        self._native.close()

    def fork(self) -> KVCache:
        """Another conversation with the same past."""
        twin = object.__new__(KVCache)
        twin.__dict__.update(self.__dict__)
        twin._native, twin._ranking = self._native.fork(), self._ranking.fork()
        return twin

    def commit(self, tokens: int) -> None:
        """The graph run that appended ``tokens`` succeeded."""
        self._native.commit()
        self.total_tokens += tokens

    def rollback(self) -> None:
        """Forgets what a graph run that failed or was cancelled has appended."""
        self._native.rollback()

    def forget_from(self, position: int) -> None:
        """Forgets all tokens at ``position`` and later, as if they had never been read.

        Layers and heads with a window can go back by `WINDOW_SLACK` tokens, or to a `mark`; the others anywhere.

        Raises:
            CacheFullError: a layer or head with a window has forgotten what a query at ``position`` would see, or there
                is no room for what comes back from the archive. Nothing has changed.
        """
        try:
            self._native.forget_from(position)
        except RuntimeError as error:
            raise CacheFullError(str(error)) from None
        self.total_tokens = min(self.total_tokens, position)
        self._ranking.forget_from(position)

    def mark(self) -> None:
        """Keeps what layers and heads with a window hold, so that `forget_from` can come back whatever is read."""
        self._native.mark()

    def release_mark(self) -> None:
        """Gives the memory of what only `mark` has kept back."""
        self._native.release_mark()

    def watch(self, first: int, end: int) -> None:
        """From now on queries of tokens at ``end`` and later note what attention they give to the pairs at positions
        ``first`` to ``end - 1``, all of which must be hot. Equal numbers: no more."""
        self._native.watch(first, end)

    def keep_watched(self, first: int) -> None:
        """What the pairs that are watched, from the position ``first`` on, have added to what attention reads is their
        score from here on: the largest share of a query's attention, times the length of the value. Nothing is watched
        any more."""
        for layer in self._shape.full_layers:
            for head in range(self._shape.kv_heads):
                shares = np.exp(self._native.watched(layer, head))
                norms = self._native.value_norms(layer, head, first, first + len(shares))
                self._ranking.keep(layer, head, first, shares * norms)
        self._native.watch(0, 0)

    @property
    def ranked_until(self) -> int:
        """Pairs before this position have scores that they keep."""
        return self._ranking.until

    def trim(self) -> None:
        """Gives memory that was freed back to the operating system, which large prunings leave a lot of."""
        self._native.trim()

    def sections(self) -> list[SectionToWrite]:
        """What `SnapshotStore.save` writes; made as it is written, in memory for one layer's hot pages. The last run
        must be committed, and the cache must not change meanwhile.

        Raises:
            StorageError: pairs were lost to a full disk.
        """
        return layer_sections(self._native, self._shape.layers) + self._ranking.sections()

    def snapshot_bytes(self) -> int:
        """Bytes of all `sections`. Raises StorageError as they do."""
        return saved_bytes(self._native, self._shape.layers) + self._ranking.saved_bytes()

    def snapshot_extra(self) -> dict[str, Any]:
        """What `restored` wants to find in the snapshot's metadata under ``extra``."""
        return {"total_tokens": self.total_tokens}

    def held_tokens(self) -> int:
        """Tokens per KV head that are in the hot tier now: the mean over the heads of the layer that holds most.

        Of the layers and heads that see everything; the others hold their window. Where all have one: of these.
        """
        return max(map(self._tokens, self._shape.full_layers or range(self._shape.layers)))

    def _tokens(self, layer: int) -> int:
        """Per KV head, rounded up."""
        heads = self._shape.full_heads(layer) or range(self._shape.kv_heads)
        return -(-sum(self._native.tokens(layer, head) for head in heads) // len(heads))

    def usage(self) -> KVUsage:
        """Bytes and tokens by tier."""
        archive = self._native.archive_usage()
        return KVUsage(
            self._native.bytes + archive["sink_bytes"],
            self.held_tokens(),
            self.total_tokens,
            archive["warm_bytes"],
            archive["cold_bytes"],
            archive["digest_bytes"],
            archive["lost_tokens"],
            archive["flash_bytes_read"],
        )

    def demote(self, hot_tokens: int | None = None) -> None:
        """Prunes every layer to ``hot_tokens`` per KV head (None: the cache's own budget, if it has one).

        With an archive less than its `step_tokens` more stay, and the sinks count although they are kept there.

        Raises:
            CacheFullError: pages are shared with a fork and there is no room for copies; every layer is consistent.
            StorageError: the archive's folder takes no file.
        """
        budget = self.hot_tokens if hot_tokens is None else hot_tokens
        if budget is None:
            return
        if self._archive is not None:
            self._archive_before_window(self._archive, budget)
            return
        for layer in range(self._shape.layers):
            window = self._shape.window(layer)
            heads = range(self._shape.kv_heads) if window else self._shape.full_heads(layer)
            if 0 < window <= budget or not heads:
                continue  # it holds its window
            if self._tokens(layer) > budget:
                try:
                    prune_layer(
                        self._native, layer, budget, ranking=self._ranking, settings=self._settings,
                        kv_heads=self._shape.kv_heads, heads=heads,
                        unseen_until=self.total_tokens - window + 1 if window else 0,
                    )  # fmt: skip
                except RuntimeError as error:  # the pool's limit, which the message names
                    raise CacheFullError(str(error)) from None
        self._ranking.forget_dropped(self._native)

    def _archive_before_window(self, archive: ArchiveOptions, budget: int) -> None:
        until = (self.total_tokens - archive.window) // archive.step_tokens * archive.step_tokens
        before = self._native.archived_until
        if until <= before or until < archive.sinks:
            return
        kept = budget - archive.sinks - archive.window
        beyond_reach = 0 < archive.reach < self.total_tokens
        scored = kept > 0 and not beyond_reach
        mixed = find_codec(archive.codec).mixed
        layers = self._shape.full_layers
        scores = [self._archive_scores(layer, until) for layer in layers] if scored or mixed else []
        blocks = None
        if mixed:
            tokens = np.zeros((len(layers), self._shape.kv_heads, until - before), dtype=np.float32)
            for place, (layer, layer_scores) in enumerate(zip(layers, scores, strict=True)):
                tokens[place, list(self._shape.full_heads(layer))] = layer_scores[:, -(until - before) :]
            blocks = tokens.reshape(*tokens.shape[:2], -1, BLOCK_TOKENS).max(axis=-1)
        try:
            self._native.archive(until, blocks, threads=self._threads)
            if scored:
                for layer, layer_scores in zip(layers, scores, strict=True):
                    self._keep_scored(layer, layer_scores, kept)
            else:
                self._native.drop_archived()
        except RuntimeError as error:
            if FULL_MESSAGE in str(error):
                raise CacheFullError(str(error)) from None
            message = f"old tokens cannot be kept on disk: {error}; make room there, or use --disk 0"
            raise StorageError(message) from None
        self._ranking.forget_dropped(self._native)

    def _archive_scores(self, layer: int, until: int) -> NDArray[np.float32]:
        """Scores of the hot tokens before ``until`` [heads that see everything, tokens]; sinks are attended anyway."""
        assert self._archive is not None
        heads = self._shape.full_heads(layer)
        which: Sequence[int | None] = [None] if len(heads) == self._shape.kv_heads else heads
        found = [self._ranking.rank(self._native, layer, head) for head in which]
        positions = np.concatenate([view.positions for view, _ in found])
        scores = np.concatenate([rows for _, rows in found])
        scores[positions < round_up(self._archive.sinks, BLOCK_TOKENS)] = -np.inf
        return scores[:, : np.searchsorted(positions[0], until)]

    def _keep_scored(self, layer: int, scores: NDArray[np.float32], kept: int) -> None:
        heads = self._shape.full_heads(layer)
        tokens, old = self._native.tokens(layer, heads[0]), scores.shape[1]
        kept = min(kept, int(np.isfinite(scores).sum(axis=1).min()))
        best = np.sort(np.argpartition(scores, old - kept, axis=1)[:, old - kept :], axis=1) if kept else scores[:, :0]
        recent = np.broadcast_to(np.arange(old, tokens), (scores.shape[0], tokens - old))
        chosen = np.concatenate([best, recent], axis=1).astype(np.int32)
        every = [np.arange(self._native.tokens(layer, head), dtype=np.int32) for head in range(self._shape.kv_heads)]
        for head, row in zip(heads, chosen, strict=True):
            every[head] = row
        self._native.retain_layer(layer, every)
