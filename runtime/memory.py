"""What this process holds and what a model's work costs, for the planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from .. import kernels
from ..cache import CacheSettings, StreamingHeads
from ..cache.codecs import find_codec
from ..cache.lowrank import bytes_per_token
from ..cache.mergers import NONE, find_merger
from ..cache.retrievers import find_retriever
from ..cache.scorers import find_scorer
from ..devices.planner import ArchiveCost, Costs, WindowCost
from ..export.package import Package
from ..export.spec import ModelSpec

STORAGE_BYTES = {"bf16": 2, "fp32": 4}
CODECS_OF_CHOICE = ("q8", "grouped4", "grouped3", "grouped2")  # the planner's, the best quality first
RETRIEVERS_OF_CHOICE = ("channels", "landmark")  # likewise


def page_bytes(head_size: int, storage: str, *, retention: bool = False) -> int:
    """Bytes of one cache page of one KV head: keys, values, positions and retention scores, in whole cache lines."""
    tokens = kernels.PAGE_TOKENS
    raw = 2 * tokens * head_size * STORAGE_BYTES[storage] + 4 * tokens * (1 + retention)
    return -(-raw // 64) * 64


def scratch_bytes_per_chunk_token(package: Package) -> int:
    """Working memory of the graph for each token of a chunk.

    The widest point of the graph is the feed-forward block: residual, normed input, gate, up and their product in
    float32, beside the product's 16-bit codes; ONNX Runtime's arena keeps about one more of the wide ones, and the
    attention's workspace holds queries and outputs of all heads twice.
    """
    spec = package.spec
    wide, hidden, heads = spec.feed_forward, spec.hidden, spec.heads * spec.head_size
    return 4 * (4 * wide + 6 * hidden + 6 * heads) + 3 * wide


def full_heads(spec: ModelSpec, windows: Sequence[int], streaming: StreamingHeads | None = None) -> int:
    """How many KV heads of all layers keep everything; ``windows`` and ``streaming`` as an engine has them."""
    layers = spec.layers - sum(window > 0 for window in windows)
    return layers * spec.kv_heads - (streaming.count if streaming else 0)


def window_costs(
    spec: ModelSpec, windows: Sequence[int], storage: str, *, streaming: StreamingHeads | None = None,
    retention: bool = False,
) -> tuple[WindowCost, ...]:  # fmt: skip
    """The other heads, those with the same window together; sinks that are held beside it are part of it here."""
    heads = Counter({window: windows.count(window) * spec.kv_heads for window in windows if window})
    if streaming:
        heads[streaming.sinks + streaming.window] += streaming.count
    head = page_bytes(spec.head_size, storage, retention=retention)
    return tuple(WindowCost(window, count * head) for window, count in sorted(heads.items()))


def archive_costs(
    package: Package, settings: CacheSettings, windows: Sequence[int] = (), streaming: StreamingHeads | None = None
) -> tuple[ArchiveCost, ...]:  # fmt: skip
    """What a plan may use: the codec and retriever that were asked for, or those of choice, the best first."""
    spec = package.spec
    codecs = (settings.codec,) if settings.codec else CODECS_OF_CHOICE
    retrievers = (settings.retriever,) if settings.retriever else RETRIEVERS_OF_CHOICE
    heads = full_heads(spec, windows, streaming)

    def cost(codec: str, retriever: str) -> ArchiveCost:
        finder, size = find_retriever(retriever), spec.head_size
        payload = heads * bytes_per_token(find_codec(codec), size, settings.low_rank)
        return ArchiveCost(codec, payload, retriever, heads * finder.digest_bytes_per_token(size), finder.step_tokens)

    return tuple(cost(codec, retriever) for retriever in retrievers for codec in codecs)


def unpacked_bytes(package: Package) -> int:
    """What the portable flavour takes for a moment on the CPU: the largest matrix of 8 bits, as floats."""
    sizes = (matrix["rows"] * matrix["columns"] for matrix in package.manifest.matrices if matrix["bits"] == 8)
    return 4 * max(sizes, default=0)


def portable_costs(package: Package, costs: Costs, observed_queries: int) -> Costs:
    """The figures for the portable flavour: each run makes a new cache beside the old one, and scoring takes a row of
    logits for each observed query of each head.
    """
    spec = package.spec
    return replace(
        costs,
        process_bytes=costs.process_bytes + unpacked_bytes(package),
        kv_bytes_per_page=2 * costs.kv_bytes_per_page,
        windows=tuple(replace(cost, page_bytes=2 * cost.page_bytes) for cost in costs.windows),
        scoring_bytes_per_token=4 * (4 * spec.kv_heads * spec.head_size + 3 * observed_queries * spec.heads),
    )


def demotion_bytes_per_token(spec: ModelSpec, settings: CacheSettings) -> int:
    """Working memory of pruning for each token that is held: scoring a layer, then merging in it, a head at a time;
    and the scores of all layers that a scorer keeps."""
    scorer = find_scorer(settings.scorer)
    one_layer = scorer.scoring_bytes_per_token(spec.kv_heads, spec.head_size)
    if settings.merge != NONE:
        merging = find_merger(settings.merge).merging_bytes_per_token(spec.head_size)
        one_layer = max(one_layer, merging + 4 * spec.kv_heads)
    return one_layer + spec.layers * scorer.kept_bytes_per_token(spec.kv_heads)


def costs_of(
    package: Package, settings: CacheSettings, *, process_bytes: int, threads: int = 1, windows: Sequence[int] = (),
    streaming: StreamingHeads | None = None,
) -> Costs:  # fmt: skip
    """The planner's figures for one conversation with this model; ``windows``, ``streaming`` as its engine has them."""
    spec = package.spec
    pages = full_heads(spec, windows, streaming)
    scorer = find_scorer(settings.scorer)
    costs = Costs(
        process_bytes=process_bytes,
        weight_bytes=package.weight_bytes,
        scratch_bytes_per_chunk_token=scratch_bytes_per_chunk_token(package),
        page_tokens=kernels.PAGE_TOKENS,
        kv_bytes_per_page=pages * page_bytes(spec.head_size, settings.storage, retention=scorer.needs_retention),
        # twice: what a run that is rolled back must restore
        observed_bytes=2 * scorer.observed_queries * spec.layers * spec.heads * spec.head_size * 4,
        scoring_bytes_per_token=demotion_bytes_per_token(spec, settings),
        archive=archive_costs(package, settings, windows, streaming),
        heads=max(pages, 1),
        threads=threads,
        windows=window_costs(spec, windows, settings.storage, streaming=streaming, retention=scorer.needs_retention),
    )
    if package.manifest.flavour == "portable":
        return portable_costs(package, costs, scorer.observed_queries)
    return costs
