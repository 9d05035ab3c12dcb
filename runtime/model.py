"""`load`: a model by name, file or folder, ready to read documents inside one memory limit."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import ArchiveOptions, CacheSettings, KVCache
from ..devices.files.cache_folder import cache_folder, cold_folder
from ..devices.files.safe_write import make_folder
from ..devices.flash import default_disk_limit
from ..devices.machine import release_free_memory, resident_memory
from ..devices.planner import WHOLE_TOKENS, Costs, Plan, compiled_plan, make_plan, why
from ..devices.reporting import Notice, Progress, log_notice, no_progress
from ..devices.sizes import format_size, parse_size
from ..errors import ClosedError, ContextLengthError, DocumentError, OptionError
from ..export.hub.registry import DEFAULT_MODEL
from ..export.package import Package
from ..export.resolve import resolve_model
from .chat_template import ChatTemplate
from .compiling import Compiling, longest_request, open_uncompiled, piece_tokens
from .context import Context
from .documents import read_documents
from .engines import DEVICES as _DEVICES
from .engines import ConversationCache, Engine, open_engine, require_engine
from .engines.rules import NATIVE, find_rules
from .file_settings import with_settings_of
from .memory import CODECS_OF_CHOICE, RETRIEVERS_OF_CHOICE, full_heads
from .options import Options
from .snapshots import LEAST_TOKENS, DocumentSnapshots
from .tokenizer import Tokenizer

DEVICES = tuple(_DEVICES)
MOST_TOKENS = 1 << 24  # of a conversation whose far tokens are recalled: the cache's positions have room for more
ANSWER_ROOM = 1024  # tokens of questions and answers that a plan makes room for beside the document
OUTGROWN_RECALL_TOKENS = 4096  # of a whole cache that outgrew its memory
READ_CHUNK = 512
DEFAULT_YARN_FACTOR, MOST_YARN_FACTOR = 4.0, 64.0
BYTES_PER_TOKEN_OF_TEXT = 4  # on average, in English
BYTES_PER_ID = 40  # of a token id in a Python list: pointer and number


class Model:
    """A loaded model. Contexts made by `read` share its weights and nothing else."""

    def __init__(
        self,
        package: Package,
        options: Options,
        *,
        name: str,
        notice: Notice = log_notice,
        cache_dir: Path | None = None,
        snapshots: DocumentSnapshots | None = None,
    ) -> None:
        self.name = name
        self.options = options
        self.cache_dir = cache_dir
        self._package = package
        self._notice = notice
        self._tokenizer = Tokenizer.open(package.folder, package.manifest.tokenizer)
        release_free_memory()  # opening it takes more than keeping it: before an engine has its weights in memory
        self._engine: Engine | None = open_engine(
            package, options.threads, options.settings, options.device, options.engine
        )
        self._snapshots = snapshots if self._engine.saves else None
        tokens = package.manifest.tokenizer
        self._template = ChatTemplate(
            tokens.chat_template, bos_token=self._spelling(tokens.bos_id), eos_token=self._spelling(tokens.eos_id)
        )
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()  # one that is dropped gives its memory back
        release_free_memory()
        self._used_bytes = resident_memory().total_bytes
        self._has_run = False

    @property
    def tokenizer(self) -> Tokenizer:
        """``encode(text) -> list[int]`` and ``decode(ids) -> str``."""
        return self._tokenizer

    @property
    def template(self) -> ChatTemplate:
        """The model's chat template."""
        return self._template

    @property
    def package(self) -> Package:
        """The files and the spec behind this model."""
        return self._package

    @property
    def engine(self) -> Engine:
        """The session. Raises ClosedError after `close`."""
        if self._engine is None:
            raise ClosedError(f"the model {self.name} is closed; load it again")
        return self._engine

    @property
    def recalls(self) -> bool:
        """Whether what leaves the hot tier is kept, and recalled when a question needs it."""
        return self.options.recalls and self.engine.recalls

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token in a full cache of 16-bit floats."""
        return self._package.spec.kv_bytes_per_token

    @property
    def context_length(self) -> int:
        """The longest text, in tokens, that the model was trained for."""
        return self._package.spec.context_length

    @property
    def longest_tokens(self) -> int:
        """The longest conversation: with policy ``auto`` beyond what the model was trained for (see `reach`)."""
        return MOST_TOKENS if self.recalls else self.context_length

    def read(
        self,
        documents: str | Path | Sequence[str | Path],
        *,
        progress: Progress | None = None,
        system: str | None = None,
    ) -> Context:
        """Reads files or folders (``-``: standard input) into a new conversation.

        ``progress(stage, done, total)`` is called with the stage ``reading`` and tokens, and with ``compiling`` where
        the policy reads a text again to rank it (``kvzip``); ``print`` will do.

        Raises:
            DocumentError: a document cannot be read as text.
            ContextLengthError: it is longer than the model's context.
            MemoryLimitError: it does not fit into the memory limit; the message has the limit that would do.
        """
        sources = [documents] if isinstance(documents, (str, Path)) else list(documents)
        read = read_documents(sources)
        for line in read.notices:
            self._notice(line)
        names = [str(source) for source in sources]
        return self.read_text(read.text, progress=progress, system=system, names=names)

    def read_text(
        self,
        text: str,
        *,
        progress: Progress | None = None,
        system: str | None = None,
        names: Sequence[str] = (),
    ) -> Context:
        """As `read`, for a text that is at hand. An empty one starts a conversation without a document.

        ``names``: what ``satchel cache list`` shows for it.
        """
        begun = time.perf_counter()
        if text and not text.strip():
            raise DocumentError("the document has only white space; nothing to read")
        ids = self._first_ids(text, system)
        if len(ids) >= self.longest_tokens:
            raise ContextLengthError(
                f"the document has {len(ids):,} tokens, the model {self.name} reads at most {self.longest_tokens:,} "
                f"with policy {self.options.policy}; use policy auto, give fewer pages, or take a model with a longer "
                "context (see 'satchel models')"
            )
        if self._has_run:  # the first document was measured, this one is not
            self._used_bytes += sys.getsizeof(text) + BYTES_PER_ID * len(ids)
        context = self.open_context(len(ids), has_document=bool(text), has_system=system is not None, ids=ids)
        try:
            head = len(self._tokenizer.encode_segments(self._template.prefix(system, None)))
            self._read_into(context, ids, progress or no_progress, names, head=head)
        except BaseException:
            context.close()
            raise
        context.read_seconds = time.perf_counter() - begun
        return context

    def _read_into(
        self, context: Context, ids: list[int], progress: Progress, names: Sequence[str], *, head: int
    ) -> None:
        """Reads, compiles and saves what the new conversation has not yet of ``ids``, the first ``head`` of which are
        the chat template's."""
        known, read = context.tokens, None
        context.reopened = known > 0
        least = known + LEAST_TOKENS if not context.waits_for_compiling else LEAST_TOKENS
        snapshots = self._snapshots if len(ids) >= least else None
        if known < len(ids):
            context.read_ids(ids[known:], progress, total=len(ids))
        if context.waits_for_compiling:
            if snapshots is not None:
                read = context.save(snapshots, ids, names)  # compiling takes long, and may be stopped
            context.compile(ids, progress, head=head)
        if snapshots is not None and context.save(snapshots, ids, names) and read:
            snapshots.discard(read)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [vocab] after these ids, with the full cache and fresh state: for tests and tools."""
        return self.last_logits(token_ids)

    def last_logits(self, token_ids: Sequence[int], *, chunk: int = READ_CHUNK) -> NDArray[np.float32]:
        """As `logits`, read ``chunk`` tokens at a time."""
        ids = list(token_ids)
        if chunk < 1:
            raise OptionError(f"chunk is {chunk}; read 1 token or more at a time")
        if not ids:
            raise OptionError("no token ids given; logits follow at least one token")
        vocab = self._package.spec.vocab
        if min(ids) < 0 or max(ids) >= vocab:
            raise OptionError(f"a token id is outside the vocabulary of {vocab}")
        self._measure()
        self._has_run = True
        cache = self.engine.new_cache(self.options.settings, hot_tokens=None)
        try:
            for first in range(0, len(ids), chunk):
                row = self.engine.run(ids[first : first + chunk], cache)
            return row
        finally:
            cache.close()

    def close(self) -> None:
        """Closes every context and gives the weights back."""
        for context in list(self._contexts):
            context.close()
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        release_free_memory()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- For contexts --------------------------------------------------------------------------------------------

    def forget(self, context: Context) -> None:
        """A context was closed."""
        self._contexts.discard(context)

    def adopt(self, context: Context) -> None:
        """A context was made (by `read` or by a fork)."""
        self._contexts.add(context)

    def cancel_run(self, cache: ConversationCache) -> None:
        """Stops what the engine does for ``cache``; nothing to stop is no error, so that signal handlers may call."""
        if self._engine is not None:
            self._engine.cancel(cache)

    def notice(self, text: str) -> None:
        """Tells the person one line."""
        self._notice(text)

    def _first_ids(self, text: str, system: str | None) -> list[int]:
        segments = self._template.prefix(system, text) if text or system is not None else []
        return self._tokenizer.encode_segments(segments) if segments else []

    def _spelling(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.decode([token], special=True)

    def open_context(
        self, tokens: int, *, has_document: bool = True, has_system: bool = False, ids: Sequence[int] = ()
    ) -> Context:
        """A conversation planned for ``tokens`` tokens and an answer: empty, or with what a snapshot has of ``ids``."""
        plan = self._plan(min(tokens + ANSWER_ROOM, self.longest_tokens))
        self._has_run = True
        if plan.codec is not None:
            self._notice(why(plan, CODECS_OF_CHOICE[0] if self.options.settings.codec is None else None))
        elif plan.hot_tokens is not None and tokens > plan.hot_tokens:
            self._notice(
                f"{format_size(plan.limit_bytes)} of memory: {plan.hot_tokens:,} of {tokens:,} tokens stay hot for "
                f"each head (policy {self.options.settings.scorer})"
            )
        archive, compiling, after = self._archive_of(plan), None, plan
        cache = self._reopened(ids, plan, archive)
        if self._must_compile(tokens, plan) and (cache is None or cache.total_tokens < tokens):
            cache, plan, compiling = open_uncompiled(
                cache,
                plan,
                planned=lambda found: self._uncompiled_plan(found, tokens, after, has_system=has_system),
                reopened=lambda how: self._reopened(ids, how, None),
            )
        cache = cache or self.engine.new_cache(
            self.settings_of(plan),
            hot_tokens=plan.hot_tokens if compiling is None else None,
            limit_bytes=plan.kv_limit_bytes + plan.fork_bytes,
            archive=archive,
        )
        context = Context(
            self, cache, plan, fresh=not (has_document or has_system), has_system=has_system, compiling=compiling
        )
        self.adopt(context)
        return context

    def _reopened(self, ids: Sequence[int], plan: Plan, archive: ArchiveOptions | None) -> ConversationCache | None:
        """A cache with what a snapshot has of ``ids``, as ``plan`` would have read it."""
        if self._snapshots is None or len(ids) < LEAST_TOKENS:
            return None
        return self._snapshots.reopen(ids, self.engine, self.settings_of(plan), plan, archive)

    def _must_compile(self, tokens: int, plan: Plan) -> bool:
        """Whether ``tokens`` that are read by ``plan`` must be ranked before any are forgotten."""
        sees_all = full_heads(self._package.spec, self.engine.windows) > 0
        return self.options.compiles and sees_all and plan.hot_tokens is not None and tokens > plan.hot_tokens

    def _uncompiled_plan(
        self, found: KVCache | None, tokens: int, after: Plan, *, has_system: bool = False
    ) -> tuple[Plan, Compiling]:
        """How ``tokens``, of which ``found`` has the first, are held until the plan ``after`` is made true."""
        known, held, ranked = (found.total_tokens, found.held_tokens(), found.ranked_until) if found else (0, 0, 0)
        request = longest_request(self._template, self._tokenizer, system=has_system)
        size = piece_tokens(tokens, tokens - ranked, request, self.longest_tokens)
        plan = compiled_plan(
            self._costs(), self.options.memory_bytes, tokens=held + tokens - known + request + size,
            wishes=self.options.wishes, after=after,
        )  # fmt: skip
        return plan, Compiling(after, size, ranked)

    def settings_of(self, plan: Plan) -> CacheSettings:
        """The settings with what the plan chose."""
        settings = self.options.settings
        sinks = settings.sinks if plan.sinks is None else plan.sinks
        window = settings.window if plan.window is None else plan.window
        hot = None if settings.hot_tokens is None else max(settings.hot_tokens, sinks + window)
        return replace(settings, sinks=sinks, window=window, hot_tokens=hot)

    def _archive_of(self, plan: Plan) -> ArchiveOptions | None:
        """Where what leaves the hot tier goes. A whole cache has an archive too: for when it outgrows its memory."""
        if not self.recalls or not full_heads(self._package.spec, self.engine.windows, self.engine.streaming):
            return None
        settings, outgrown = self.settings_of(plan), plan.codec is None
        cold_bytes = self.disk_bytes if outgrown or plan.cold_bytes else 0
        if outgrown and not cold_bytes:
            return None
        folder = cold_folder(cache_folder(self.cache_dir))
        if cold_bytes:
            make_folder(folder)
        return ArchiveOptions(
            codec=plan.codec or settings.codec or CODECS_OF_CHOICE[0],
            retriever=plan.retriever or settings.retriever or RETRIEVERS_OF_CHOICE[0],
            sinks=settings.sinks,
            window=settings.window,
            recall_tokens=OUTGROWN_RECALL_TOKENS if outgrown else plan.recall_tokens,
            recall_every=settings.recall_every,
            reach=self._reach(plan, settings),
            warm_bytes=plan.warm_bytes,
            cold_folder=str(folder) if cold_bytes else "",
            cold_bytes=cold_bytes,
        )

    def _reach(self, plan: Plan, settings: CacheSettings) -> int:
        """Of `ArchiveOptions`. Models find less the further back it is, long before the end of their trained context
        (docs/lab-notes.md, recall is better seen from near by): long texts are recalled side by side with the window.
        """
        if plan.hot_tokens is None or plan.hot_tokens > settings.least_hot_tokens:  # hot pairs lie where they were read
            return self.context_length
        side_by_side = plan.capacity_tokens + plan.recall_tokens + settings.sinks
        wanted = settings.reach or (side_by_side if plan.is_long else WHOLE_TOKENS)
        return min(max(wanted, side_by_side), self.context_length)

    def plan(self, tokens: int) -> Plan:
        """How a text of ``tokens`` tokens (with questions and answers) would be read; nothing is.

        Raises:
            MemoryLimitError: it would not fit; the message has the limit that would do.
        """
        self._measure()
        text_bytes = tokens * (BYTES_PER_ID + BYTES_PER_TOKEN_OF_TEXT)
        plan = self._plan(tokens, text_bytes=text_bytes, longest_tokens=0)
        return self._uncompiled_plan(None, tokens, plan)[0] if self._must_compile(tokens, plan) else plan

    @property
    def disk_bytes(self) -> int:
        """What an archive may take on disk: as asked for, or a share of what the cache folder's disk has free."""
        asked = self.options.disk_bytes
        return default_disk_limit(cache_folder(self.cache_dir)) if asked is None else asked

    def _plan(self, tokens: int, *, text_bytes: int = 0, longest_tokens: int | None = None) -> Plan:
        settings, policy = self.options.settings, self.options.policy
        return make_plan(
            self._costs(text_bytes=text_bytes),
            self.options.memory_bytes,
            tokens=tokens,
            least_hot_tokens=settings.least_hot_tokens,
            wishes=self.options.wishes,
            keep_everything=policy == "full",
            longest_tokens=self.context_length if longest_tokens is None else longest_tokens,
            archive=self.recalls,
            disk_bytes=self.disk_bytes if self.recalls else 0,
        )

    def _costs(self, *, text_bytes: int = 0) -> Costs:
        """The planner's figures for one more conversation."""
        self._measure()
        # Forks share the pages of what they were forked from, and its plan.
        plans = {id(context.plan): context.plan for context in self._contexts}.values()
        others = sum(plan.kv_ram_bytes + plan.fork_bytes for plan in plans)
        return self.engine.costs(self.options.settings, process_bytes=self._used_bytes + text_bytes + others)

    def _measure(self) -> None:
        """Notes what the process holds before its first run: later, weights and scratch would be counted twice."""
        if not self._has_run:
            release_free_memory()
            self._used_bytes = max(self._used_bytes, resident_memory().total_bytes)


def parse_rope(text: str) -> float:
    """The factor of YaRN in ``as-trained``, ``yarn`` or ``yarn:FACTOR``; 1 for none. Raises OptionError."""
    name, colon, number = text.partition(":")
    try:
        factor = float(number) if colon else DEFAULT_YARN_FACTOR
    except ValueError:
        factor = 0.0
    if text == "as-trained":
        return 1.0
    if name != "yarn" or not 1 < factor <= MOST_YARN_FACTOR:
        raise OptionError(
            f"rope {text!r} is not known; give as-trained, yarn, or yarn:FACTOR with a factor above 1, at most "
            f"{MOST_YARN_FACTOR:g}"
        )
    return factor


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    memory: str | int | None = None,
    policy: str = "auto",
    kv: Mapping[str, Any] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    disk: str | int | None = None,
    rope: str = "as-trained",
    engine: str = NATIVE,
    cache: bool = True,
    cache_limit: str | int | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], object] | None = None,
) -> Model:
    """Loads a model: a registry name, a package folder, or a .gguf file (exported once, then cached).

    Args:
        memory: limit of the whole process, such as ``"1.5GB"`` or a number of bytes; None: what the machine can give.
        policy: ``full`` keeps every token as it is; ``auto`` does, up to some thousand tokens, and then keeps old ones
            encoded, in memory or on disk, and recalls what a question needs; a scorer's name forgets by its scores.
        kv: settings of the cache: ``hot_tokens``, ``chunk``, ``sinks``, ``window``, ``scorer``, ``storage``,
            ``budget_bytes``, ``codec``, ``retriever``, ``recall_tokens``, ``recall_every``, ``reach``,
            ``lowrank`` (``cskv`` or ``think``: archived pairs are ``rank`` percent of their channels),
            ``head_budgets`` (``adaptive``: the heads of a layer share a scorer's budget), ``merge`` (``lookm``,
            ``lococo``, ``chelsea``: what it forgets goes into what stays), ``heads`` (a head profile: ``razor``,
            ``duo`` or ``hybrid``), ``streaming_heads`` (percent of the KV heads that the former two leave with sinks
            and window).
        threads: None: all cores that this process may use.
        device: ``cpu``, ``cuda``, ``dml`` or ``coreml``: all but the first take the portable flavour of the model.
        disk: what demoted pages may take on disk, such as ``"4GB"``; 0: nothing; None: a tenth of what is free.
        rope: ``yarn`` or ``yarn:FACTOR`` (4 when left out) stretches the positions so that the model reads that many
            times its trained context (YaRN, arXiv 2309.00071); ``as-trained`` leaves them.
        engine: ``native``, or ``llama.cpp``: runs the .gguf file itself on llama-cpp-python (extra ``llama-cpp``);
            forgets by ``recency``, ``keydiff`` or ``snapkv`` instead of recalling, ``kv`` storage is f16, q8_0 or q4_0.
        cache: whether to open and save snapshots of read documents: what was read once is not read twice.
        cache_limit: what all snapshots may take on disk; the least recently used go first. None: a tenth of the disk's
            free space, at most 20 GB.
        cache_dir: where models and packages lie; None: the platform's cache folder.
        progress: called with (stage, done, total) while a model is fetched or exported.
        notice: called with lines that a person should know; None: the logger ``satchel``.

    Raises:
        OptionError: an argument is unknown or out of range.
        ModelError, DownloadError, StorageError: the model cannot be had.
    """
    limit = None if cache_limit is None else parse_size(cache_limit)
    yarn_factor = parse_rope(rope)
    Options.check(memory, policy, kv, threads, device, disk, engine)
    require_engine(engine)
    tell = notice or log_notice
    package = resolve_model(
        model, cache_dir=Path(cache_dir) if cache_dir else None, progress=progress, notice=tell,
        flavour="native" if device == "cpu" else "portable", linked=find_rules(engine).linked,
    )  # fmt: skip
    if yarn_factor > 1 and package.linked_file is not None:
        raise OptionError("--rope is not for engine llama.cpp; leave out one of the two")
    package = replace(package, yarn_factor=yarn_factor)
    if package.manifest.flavour == "portable" and device == "cpu":
        tell("the portable flavour is slow on the CPU, where it is a check for other devices; use the native one")
    kv = with_settings_of(package, kv, policy, engine, tell)
    options = Options.check(memory, policy, kv, threads, device, disk, engine)
    folder = Path(cache_dir) if cache_dir else None
    snapshots = None
    if cache:
        snapshots = DocumentSnapshots(
            package.fingerprint, str(model), cache_dir=folder, limit_bytes=limit, threads=options.threads, notice=tell
        )
    return Model(package, options, name=str(model), notice=tell, cache_dir=folder, snapshots=snapshots)
