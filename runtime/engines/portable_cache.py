"""The KV cache of a conversation in the portable engine: tensors on the device, one pair for each layer.

A run makes new tensors and leaves the old ones alone. That costs a copy of the cache for each run, where a shared
buffer would cost none; but every execution provider has this form, and with it forks, cancelled runs and prompts that
fail need no bookkeeping: they keep the tensors that they had.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...cache import FULL_MESSAGE, ArchiveOptions, CacheFullError, CacheSettings, KVUsage
from ...errors import SnapshotError
from ...export.spec import ModelSpec

Slots = NDArray[np.int64]
WINDOW_SLACK = 64  # tokens beyond a window before they are cut off: not at each step


@dataclass(frozen=True)
class LayerState:
    """One layer: ``key`` and ``value`` [1, K, T, D]; ``queries`` the last ones (None: the scorer needs none).

    Slots hold the positions ``kept`` [K, n], and then all from ``first`` on.
    """

    key: ort.OrtValue
    value: ort.OrtValue
    queries: ort.OrtValue | None
    kept: Slots
    first: int

    @property
    def tokens(self) -> int:
        """Slots of each head."""
        return int(self.key.shape()[2])

    def positions(self) -> Slots:
        """int64 [K, T]"""
        heads, count = self.kept.shape
        recent = np.arange(self.first, self.first + self.tokens - count)
        return np.concatenate([self.kept, np.broadcast_to(recent, (heads, recent.size))], axis=1)


class CacheDevice(Protocol):
    """What the cache asks of the engine: work on tensors where they are."""

    spec: ModelSpec
    layer_windows: tuple[int, ...]
    storage_bytes: int

    def empty_layers(self) -> list[LayerState]: ...
    def gather(self, state: LayerState, kept: Slots) -> tuple[ort.OrtValue, ort.OrtValue]: ...
    def prune(
        self, layer: int, state: LayerState, query_positions: Slots, settings: CacheSettings, budget: int
    ) -> tuple[Slots, ort.OrtValue, ort.OrtValue]: ...


class PortableCache:
    """See `ConversationCache`. ``limit_bytes`` bounds this cache and its forks, what a run makes beside it included."""

    recalls = False
    archive_options: ArchiveOptions | None = None

    def __init__(
        self, device: CacheDevice, settings: CacheSettings, *, hot_tokens: int | None, limit_bytes: int = 0
    ) -> None:
        self.hot_tokens = hot_tokens
        self.total_tokens = 0
        self.settings = settings
        self.layers = device.empty_layers()
        self.query_positions: Slots = np.zeros(0, np.int64)
        self._device = device
        self._limit_bytes = limit_bytes
        self._mark: tuple[int, dict[int, LayerState]] | None = None
        self._family: weakref.WeakSet[PortableCache] = weakref.WeakSet([self])

    @property
    def closed(self) -> bool:
        return not self.layers

    def close(self) -> None:
        """Frees the memory; using the cache afterwards is an error."""
        self.layers, self._mark = [], None
        self._family.discard(self)

    def fork(self) -> PortableCache:
        """Another conversation with the same past: the tensors are shared for good, new ones are each one's own."""
        twin = object.__new__(PortableCache)
        twin.__dict__.update(self.__dict__)
        twin.layers, twin._mark = list(self.layers), None
        self._family.add(twin)
        return twin

    def states(self) -> list[LayerState]:
        """All that it holds, what is marked included."""
        return [*self.layers, *(self._mark[1].values() if self._mark else ())]

    def require_room(self, tokens: int) -> None:
        """Before a run of ``tokens``. Raises CacheFullError when its tensors beside the present ones are too much."""
        if not self._limit_bytes:
            return
        held = {id(state.key): state for cache in self._family for state in cache.states()}
        after = sum(self._bytes(state.tokens + tokens) for state in self.layers)
        needed = sum(self._bytes(state.tokens) for state in held.values()) + after
        if needed > self._limit_bytes:
            raise CacheFullError(f"{FULL_MESSAGE} of {self._limit_bytes} bytes: {needed}")

    def append(self, tensors: Sequence[tuple[ort.OrtValue, ort.OrtValue, ort.OrtValue | None]], tokens: int) -> None:
        """What a run of ``tokens`` has made of each layer: key, value, queries. Layers with a window forget what no
        later token sees.
        """
        total = self.total_tokens + tokens
        layers = [
            LayerState(key, value, queries, state.kept, state.first)
            for state, (key, value, queries) in zip(self.layers, tensors, strict=True)
        ]
        self.layers, observed = self._trimmed(layers, total, WINDOW_SLACK), tensors[0][2]
        if observed is not None:
            new = np.arange(self.total_tokens, total)
            self.query_positions = np.concatenate([self.query_positions, new])[-observed.shape()[0] :]
        self.total_tokens = total

    def mark(self) -> None:
        """Keeps the layers with a window as they are: `forget_from` can come back here, whatever is read."""
        windows = self._device.layer_windows
        self._mark = self.total_tokens, {layer: self.layers[layer] for layer, window in enumerate(windows) if window}

    def release_mark(self) -> None:
        """Gives back what only `mark` has kept."""
        self._mark = None

    def forget_from(self, position: int) -> None:
        """Forgets all tokens at ``position`` and later. Where heads have kept different numbers of earlier ones, the
        oldest after the sinks go too: all heads of all layers hold equally many, apart from layers with a window.
        """
        if position >= self.total_tokens:
            return
        left = int(np.searchsorted(self.query_positions, position))
        windows = [bool(window) for window in self._device.layer_windows]
        layers = list(self.layers)
        if self._mark is not None and self._mark[0] == position:  # what has left the windows since then is there
            for layer, state in self._mark[1].items():
                layers[layer] = replace(state, queries=layers[layer].queries)
        counts = [(state.positions() < position).sum(axis=1) for state in layers]
        least = {kind: min(int(each.min()) for each, its in zip(counts, windows, strict=True) if its == kind)
                 for kind in set(windows)}  # fmt: skip
        self.layers = [
            self._before(state, position, _newest(each, least[kind], self.settings.sinks), left)
            for state, each, kind in zip(layers, counts, windows, strict=True)
        ]
        self.query_positions = self.query_positions[:left]
        self.total_tokens = position

    def held_tokens(self) -> int:
        """Tokens per KV head in the layers that see everything; in those with a window if there are no others."""
        whole = [
            state.tokens for state, window in zip(self.layers, self._device.layer_windows, strict=True) if not window
        ]
        return max(whole or (state.tokens for state in self.layers))

    def usage(self) -> KVUsage:
        """Bytes and tokens: all of it is hot."""
        return KVUsage(sum(self._bytes(state.tokens) for state in self.layers), self.held_tokens(), self.total_tokens)

    def demote(self, hot_tokens: int | None = None) -> None:
        """Prunes each layer to ``hot_tokens`` per KV head (None: the cache's own budget, if it has one).

        Layers with a window keep the newest tokens, as many as the longest window has, whatever the budget: their
        attention counts slots, so that these must be neighbours, and sees nothing else.
        """
        budget = self.hot_tokens if hot_tokens is None else hot_tokens
        if budget is None:
            return
        layers = self._trimmed(self.layers, self.total_tokens, 0)
        for layer, state in enumerate(layers):
            if self._device.layer_windows[layer] or state.tokens <= budget:
                continue
            slots, key, value = self._device.prune(layer, state, self.query_positions, self.settings, budget)
            kept = np.take_along_axis(state.positions(), slots, axis=1)
            layers[layer] = LayerState(key, value, state.queries, kept, self.total_tokens)
        self.layers = layers

    def sections(self) -> list[Any]:
        """Raises SnapshotError: the portable engine saves nothing."""
        raise SnapshotError("caches of the portable flavour cannot be saved; use the native flavour", damaged=False)

    def snapshot_bytes(self) -> int:
        """Raises SnapshotError, as `sections`."""
        return len(self.sections())

    def _bytes(self, tokens: int) -> int:
        spec = self._device.spec
        return 2 * spec.kv_heads * tokens * spec.head_size * self._device.storage_bytes

    def _trimmed(self, layers: Sequence[LayerState], total: int, slack: int) -> list[LayerState]:
        """The layers after ``total`` tokens, those with a window cut to it if they hold ``slack`` more."""
        window, found = max(self._device.layer_windows), list(layers)
        for layer, state in enumerate(found):
            if self._device.layer_windows[layer] and state.tokens > window + slack:
                slots = np.arange(state.tokens - window, state.tokens)
                slots = np.broadcast_to(slots, (len(state.kept), window))
                key, value = self._device.gather(state, slots)
                kept = np.take_along_axis(state.positions(), slots, axis=1)
                found[layer] = LayerState(key, value, state.queries, kept, total)
        return found

    def _before(self, state: LayerState, position: int, slots: Slots, queries_left: int) -> LayerState:
        key, value = self._device.gather(state, slots)
        queries = state.queries
        if queries is not None and queries.shape()[0] > queries_left:
            queries = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(queries.numpy()[:queries_left]))
        return LayerState(key, value, queries, np.take_along_axis(state.positions(), slots, axis=1), position)


def _newest(counts: Slots, least: int, sinks: int) -> Slots:
    """Of the first ``counts`` [K] slots of each head ``least``: the sinks and the last others."""
    slots = np.arange(least)
    return np.stack([slots + np.where(slots < sinks, 0, count - least) for count in counts])
