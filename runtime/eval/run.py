"""From what a person asks of ``satchel eval`` to a report: the sides, the items, what is done already, the rest."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...cache.scorers import scorer_names
from ...devices.files.cache_folder import cache_folder
from ...devices.machine import cores_usable
from ...devices.reporting import Notice, Progress, log_notice, no_progress
from ...errors import ContextLengthError, ModelError, OptionError
from ...export.calibration.files import read_records
from ...export.package import Package
from ...export.resolve import resolve_model
from ..bench.run import PEER, peer_file
from ..chat_template import ChatTemplate
from ..documents import read_documents
from ..engines import Cancelled, require_engine
from ..engines.rules import NATIVE, find_rules
from ..tokenizer import Tokenizer
from .conversations import check_tasks
from .haystack import Haystack
from .llama_cpp_runner import LlamaCppRunner
from .report import Report, summarize
from .results import Results, read_rows
from .satchel_runner import SatchelRunner
from .sides import FULL, Runner, Side, name_sides
from .sizing import Speaker
from .suite import Asked, Item, Suite
from .suites import find_suite

FOLDER = "eval"  # below the cache folder
DEFAULT_SEED = 7

Open = Callable[[Side], Runner]


@dataclass
class Evaluation:
    """All that is needed to measure. `run` it once; `cancel` may be called from another thread."""

    suite: Suite
    asked: Asked
    about: Mapping[str, Any]
    sides: tuple[Side, ...]
    results: Mapping[str, Mapping[str, Results]]  # by side, then by task
    items: Sequence[Item]
    open_side: Open
    kv_bytes_per_token: int
    _runner: Runner | None = field(default=None, init=False)
    _cancelled: bool = field(default=False, init=False)

    def run(self, *, progress: Progress = no_progress, notice: Notice = log_notice) -> Report:
        """Measures what is not done yet, side by side; a finished sample is kept at once.

        Raises:
            Cancelled: by `cancel`.
            SatchelError: a side failed; what is finished is kept.
        """
        todo = {side.label: self._missing(side) for side in self.sides}
        total = sum(map(len, todo.values()))
        reused = len(self.sides) * len(self.items) - total
        if reused:
            notice(f"{reused} of {reused + total} samples were done before and are not measured again")
        done = 0
        # whom the others are compared with comes first
        for side in sorted(self.sides, key=lambda side: side.label != side.reference):
            if self._cancelled:
                raise Cancelled("the evaluation was stopped")
            if todo[side.label]:
                with self._opened(side) as runner:
                    for item in todo[side.label]:
                        self._measure(side, item, runner, self._scaled(progress, side, done, total))
                        done += 1
        return self._report(reused)

    def cancel(self) -> None:
        """Stops at the next operator; nothing to stop is no error."""
        self._cancelled = True
        if self._runner is not None:
            self._runner.cancel()

    def finished(self) -> int:
        """How many samples are kept, of all sides."""
        return sum(item.label in self.results[side.label][item.task] for side in self.sides for item in self.items)

    def _missing(self, side: Side) -> list[Item]:
        found = []
        for item in self.items:
            results = self.results[side.label][item.task]
            rows = self._rows(side, item)
            if item.label not in results or (rows is not None and read_rows(rows) is None):
                found.append(item)
        return found

    def _measure(self, side: Side, item: Item, runner: Runner, progress: Progress) -> None:
        results = self.results[side.label][item.task]
        reference = next((other for other in self.sides if other.label == side.reference != side.label), None)
        compared = None if reference is None else self._rows(reference, item)
        results.append(item.measure(runner, progress, rows=self._rows(side, item), reference=compared))

    def _rows(self, side: Side, item: Item) -> Path | None:
        if not self.suite.compares_rows or side.label != side.reference:
            return None
        return self.results[side.label][item.task].rows_file(item.label)

    def _scaled(self, progress: Progress, side: Side, before: int, total: int) -> Progress:
        """Tokens of all samples: a sample counts as its context."""
        context = self.asked.context

        def scaled(_stage: str, done: int, all_of_it: int, /) -> None:
            share = min(done / max(all_of_it, 1), 1)
            progress(f"{side.label}, sample {before + 1}/{total}", int((before + share) * context), total * context)

        scaled("reading", 0, 1)
        return scaled

    @contextmanager
    def _opened(self, side: Side) -> Iterator[Runner]:
        runner = self._runner = self.open_side(side)
        try:
            if self._cancelled:
                runner.cancel()
            yield runner
        finally:
            self._runner = None
            runner.close()

    def _report(self, reused: int) -> Report:
        sides = {}
        for side in self.sides:
            records: dict[str, list[dict[str, Any]]] = {}
            for item in self.items:
                records.setdefault(item.task, []).append(self.results[side.label][item.task][item.label])
            tasks = {task: self.suite.summary(found) for task, found in records.items()}
            everything = [record for found in records.values() for record in found]
            sides[side.label] = summarize(
                side.identity, tasks, everything, kv_bytes_per_token=self.kv_bytes_per_token
            )
        return Report(self.about, sides, self.suite.metrics, reused)


@dataclass(frozen=True)
class Order:
    """What to evaluate, as a person says it. ``samples`` None: the suite's own number; no ``tasks``: all."""

    suite: str
    context: int
    samples: int | None = None
    windows: int = 1
    tasks: Sequence[str] = ()
    seed: int = DEFAULT_SEED
    text: Sequence[Path] = ()

    def check(self) -> None:
        """Raises OptionError for what no model could do."""
        check_tasks(find_suite(self.suite), self.tasks)
        for name in ("context", "samples", "windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; give 1 or more")


def prepare(
    model: str,
    order: Order,
    *,
    policy: str = "auto",
    kv: Mapping[str, object] | None = None,
    memory: str | int | None = None,
    against: Sequence[str] = (FULL,),
    engine: str = NATIVE,
    threads: int | None = None,
    out: Path | None = None,
    cache_dir: Path | None = None,
    fresh: bool = False,
    progress: Progress = no_progress,
    notice: Notice = log_notice,
) -> Evaluation:
    """Makes ready to evaluate ``model`` with ``policy``, ``kv``, ``memory`` and ``engine`` (as of ``load``).

    Args:
        against: sides to compare with: ``full``, another policy, ``llama.cpp:f16|q8_0|q4_0``, or ``none``.
        out: where results are kept (None: in the cache folder).
        fresh: measure the evaluated side anew, whatever was done before.

    Raises:
        OptionError: an argument is unknown or out of range, or a peer is not installed.
        ContextLengthError: the context is too small for a task or too large for the model.
        DocumentError, ModelError, DownloadError, StorageError: a file cannot be had.
    """
    order.check()
    suite = find_suite(order.suite)
    sides = name_sides(policy, kv or {}, memory, against, engine)
    require_engine(engine)
    for side in sides:
        side.check(threads)
    peer = _peer(model, sides, cache_dir, progress, notice)
    linked = find_rules(engine).linked
    package = resolve_model(model, cache_dir=cache_dir, progress=progress, notice=notice, linked=linked)
    if order.context > package.spec.context_length:
        raise ContextLengthError(
            f"--context {order.context:,} is more than the {package.spec.context_length:,} tokens that the model "
            f"{model} reads; give {package.spec.context_length:,} or less"
        )
    speaker = _speaker(package)
    tasks = check_tasks(suite, order.tasks)
    haystack = _haystack(order.text, notice)
    samples = order.samples or suite.default_samples
    asked = Asked(speaker, haystack, order.context, samples, order.windows, tasks, order.seed)
    items = suite.items(asked)
    folder = (out.expanduser().absolute() if out else cache_folder(cache_dir)) / FOLDER
    results = _results(folder, package, suite, asked, sides, peer)
    if fresh:
        for found in results[sides[0].label].values():
            found.forget([item.label for item in items])
    about = {
        "model": model, "suite": suite.name, "context": order.context, "samples": samples, "seed": order.seed,
        "text": [str(path) for path in order.text] or None, "policy": policy, "folder": str(folder),
    }  # fmt: skip
    count = threads or cores_usable()

    def open_side(side: Side) -> Runner:
        if not side.kv_type:
            return SatchelRunner(package.folder, side, threads=count, notice=notice)
        assert peer is not None, "found above"
        vocab = package.spec.vocab
        return LlamaCppRunner(peer, side.kv_type, speaker, context=order.context, threads=count, vocab=vocab)

    return Evaluation(suite, asked, about, sides, results, items, open_side, package.spec.kv_bytes_per_token)


def _results(
    folder: Path, package: Package, suite: Suite, asked: Asked, sides: Sequence[Side], peer: Path | None
) -> dict[str, dict[str, Results]]:
    labels = [side.label for side in sides]
    found: dict[str, dict[str, Results]] = {}
    file_settings = {"file_kv": dict(package.manifest.kv)} if package.manifest.kv else {}
    for side in sides:
        identity = dict(side.identity) | _calibration(side, package)
        if side.kv_type and peer is not None:
            identity |= {"file": peer.name, "file_bytes": peer.stat().st_size}
        if suite.compares_rows and side.label != side.reference and side.reference in labels:
            identity["reference"] = side.reference
        about = {
            "model": package.fingerprint, "suite": suite.name, "context": asked.context, "seed": asked.seed,
            "text": asked.haystack.sha256, **suite.identity(asked), "side": identity, **file_settings,
        }  # fmt: skip
        found[side.label] = {task: Results(folder, {**about, "task": task}) for task in asked.tasks}
    return found


def _calibration(side: Side, package: Package) -> dict[str, str]:
    """Of a side whose scorer was calibrated: other heads, other results."""
    name = side.policy if side.policy in scorer_names() else side.kv.get("scorer", "")
    record = read_records(package.folder).get(str(name), {})
    return {"calibration": str(record["sha256"])} if "sha256" in record else {}


def _speaker(package: Package) -> Speaker:
    tokens = package.manifest.tokenizer
    tokenizer = Tokenizer.open(package.folder, tokens)

    def spelling(index: int | None) -> str:
        return "" if index is None else tokenizer.decode([index], special=True)

    template = ChatTemplate(
        tokens.chat_template, bos_token=spelling(tokens.bos_id), eos_token=spelling(tokens.eos_id)
    )
    return Speaker(tokenizer, template)


def _haystack(text: Sequence[Path], notice: Notice) -> Haystack:
    if not text:
        return Haystack.built_in()
    read = read_documents(list(text))
    for line in read.notices:
        notice(line)
    return Haystack(read.text)


def _peer(
    model: str, sides: Sequence[Side], cache_dir: Path | None, progress: Progress, notice: Notice
) -> Path | None:
    """The .gguf that llama.cpp shall read, if it is a side."""
    if not any(side.kv_type for side in sides):
        return None
    if importlib.util.find_spec("llama_cpp") is not None and Path(model).expanduser().is_dir():
        raise ModelError(
            f"{model} is a folder, but {PEER} reads .gguf files: give the .gguf that it was made of as MODEL"
        )
    return peer_file(PEER, model, cache_dir, progress, notice)
