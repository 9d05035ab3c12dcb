"""The leaderboard: every method at every budget, through the suites that there are, a cell after the other.

A cell is a method, a budget and a suite; its samples are those of ``satchel eval --suite``, kept in the same folder
under the same names, one by one. So a run that was stopped goes on with the sample that it was at. The order serves a
run that is stopped early: the first sample of everything comes before the second of anything, and among these the first
budget before the others. A model is loaded once for all suites of a method and budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

from ....devices.reporting import Notice, Progress, log_notice, no_progress
from ....errors import MemoryLimitError, ModelError, OptionError
from ....export.calibration.files import find_records
from ....export.calibration.methods import METHODS
from ...engines import Cancelled
from ..conversations import check_tasks
from ..ground import Ground, calibrations_used, find_peer, lay_ground
from ..run import DEFAULT_SEED, Evaluation, Order, evaluate
from ..sides import FULL, Runner, Side
from ..suite import Item
from ..suites import find_suite
from .methods import DEFAULT_BUDGETS, Budget, Method, find_methods

DEFAULT_CONTEXT = 4096
# Two that the 0.5B model can do with its whole cache, and that a single document grades in fourths and fifths.
RULER_TASKS = ("multiquery", "vt")
KL_POSITIONS = 32  # so that 64 tokens are read at a time between them at 4K: no slower than a tight budget's chunks
KL = "perplexity"
NAMES = ("needle", "ruler", "multiturn", KL)
REFUSALS = (MemoryLimitError, ModelError, OptionError)

Open = Callable[[Side], Runner]


@dataclass(frozen=True)
class BoardOrder:
    """What to compare, as a person says it. ``samples``: documents of each task; no ``methods``: all that there are."""

    context: int = DEFAULT_CONTEXT
    samples: int = 1
    budgets: Sequence[Fraction] = DEFAULT_BUDGETS
    methods: Sequence[str] = ()
    tasks: Sequence[str] = RULER_TASKS
    seed: int = DEFAULT_SEED
    text: Sequence[Path] = ()

    def check(self) -> None:
        """Raises OptionError for what no model could do."""
        find_methods(self.methods)
        check_tasks(find_suite("ruler"), self.tasks)
        for order in self.orders:
            order.check()

    @property
    def orders(self) -> tuple[Order, ...]:
        """One for each suite."""
        def order(name: str) -> Order:
            tasks = self.tasks if name == "ruler" else ()
            if name == KL:
                return Order(name, self.context, KL_POSITIONS, self.samples, tasks, self.seed, self.text)
            return Order(name, self.context, self.samples, 1, tasks, self.seed, self.text)

        return tuple(map(order, NAMES))


@dataclass(frozen=True)
class Entry:
    """A method at a budget (None: it has none). ``lacks``: why it is not measured at all."""

    method: Method
    budget: Budget | None
    side: Side
    lacks: str = ""

    @property
    def key(self) -> tuple[str, str | None]:
        """Method and budget, as a table's rows have them."""
        return self.method.name, str(self.budget.share) if self.budget else None


@dataclass(frozen=True)
class Visit:
    """What is measured while a model is loaded: samples of one entry, by suite."""

    entry: Entry
    items: Mapping[str, Sequence[Item]]

    @property
    def samples(self) -> int:
        return sum(map(len, self.items.values()))


@dataclass
class Board:
    """All that is needed to measure. `run` it once; `cancel` may be called from another thread.

    ``kept``: rows of an earlier table, by method and budget, which are not measured again; ``kept_budgets``: those of
    the table.
    """

    order: BoardOrder
    ground: Ground
    entries: tuple[Entry, ...]
    evaluations: Mapping[str, Evaluation]  # by suite
    open_side: Open
    refusals: dict[tuple[str, str], str] = field(default_factory=dict)  # by label of the side and suite
    kept: Mapping[tuple[str, str | None], Mapping[str, Any]] = field(default_factory=dict)
    kept_budgets: Sequence[Mapping[str, Any]] = ()
    _runner: Runner | None = field(default=None, init=False)
    _cancelled: bool = field(default=False, init=False)

    def run(
        self, *, progress: Progress = no_progress, notice: Notice = log_notice,
        keep: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        """Measures what is not done yet. ``keep`` is called after each visit: a table can be written then.

        Raises:
            Cancelled: by `cancel`.
            SatchelError: the full cache, which all are compared with, could not be measured.
        """
        visits = list(self._visits())
        left = sum(visit.samples for visit in visits)
        done = self.finished()
        if done:
            notice(f"{done} of {done + left} samples were done before and are not measured again")
        meter = _Meter(progress, self.order.context, len(visits), left)
        for visit in visits:
            if self._cancelled:
                raise Cancelled("the leaderboard was stopped")
            meter.begin(visit.entry.side.label)
            self._measure(visit, meter)
            meter.end(visit.samples)
            keep()

    def cancel(self) -> None:
        """Stops at the next operator; nothing to stop is no error."""
        self._cancelled = True
        if self._runner is not None:
            self._runner.cancel()

    def finished(self) -> int:
        """How many samples are kept, of all cells."""
        return sum(
            len(found) for evaluation in self.evaluations.values() for entry in self.entries
            for found in evaluation.records(entry.side).values()
        )  # fmt: skip

    def forget(self) -> None:
        """All is to be measured anew but the references."""
        for evaluation in self.evaluations.values():
            for entry in self.entries:
                if entry.side.label != entry.side.reference:
                    evaluation.forget(entry.side)

    def _visits(self) -> Iterator[Visit]:
        """In rounds: the n-th sample of each task for everybody, then the next."""
        wanted = [entry for entry in self.entries if not entry.lacks and entry.key not in self.kept]
        compared = {entry.side.reference for entry in wanted}
        missing = {
            (name, entry.side.label): {(item.task, item.label) for item in evaluation.missing(entry.side)}
            for name, evaluation in self.evaluations.items() for entry in self.entries
            if entry in wanted or entry.side.label in compared
        }  # fmt: skip
        rounds = {name: _rounds(evaluation.items) for name, evaluation in self.evaluations.items()}
        for number in range(max(map(len, rounds.values()))):
            for entry in self.entries:
                items = {
                    name: [
                        item for item in found[number]
                        if (item.task, item.label) in missing.get((name, entry.side.label), ())
                    ]
                    for name, found in rounds.items() if number < len(found)
                }  # fmt: skip
                visit = Visit(entry, {name: found for name, found in items.items() if found})
                if visit.samples:
                    yield visit

    def _measure(self, visit: Visit, meter: _Meter) -> None:
        label, refused = visit.entry.side.label, self.refusals
        try:
            runner = self._runner = self.open_side(visit.entry.side)
        except REFUSALS as error:
            if label == FULL:
                raise
            refused |= {(label, name): str(error) for name in visit.items}
            return
        try:
            if self._cancelled:
                runner.cancel()
            for name, items in visit.items.items():
                for item in items:
                    try:
                        self.evaluations[name].measure(visit.entry.side, item, runner, meter.sample())
                    except REFUSALS as error:
                        if label == FULL:
                            raise
                        refused[label, name] = str(error)
                        break
        finally:
            self._runner = None
            runner.close()


class _Meter:
    """Progress in tokens over all samples: each counts as a context, a refused one as done."""

    def __init__(self, progress: Progress, context: int, visits: int, samples: int) -> None:
        self._progress, self._context, self._visits, self._samples = progress, context, visits, samples
        self._visit, self._before, self._within, self._stage = 0, 0, -1, ""

    def begin(self, label: str) -> None:
        self._visit += 1
        self._within = -1
        self._stage = f"{label} ({self._visit} of {self._visits})"

    def sample(self) -> Progress:
        """The progress of the next sample of this visit."""
        self._within += 1
        done = self._before + self._within

        def scaled(_stage: str, part: int, whole: int, /) -> None:
            share = min(part / max(whole, 1), 1)
            self._progress(self._stage, int((done + share) * self._context), self._samples * self._context)

        scaled("reading", 0, 1)
        return scaled

    def end(self, samples: int) -> None:
        self._before += samples
        self._progress(self._stage, self._before * self._context, self._samples * self._context)


def prepare_board(
    model: str,
    order: BoardOrder,
    *,
    memory: str | int | None = None,
    threads: int | None = None,
    out: Path | None = None,
    cache_dir: Path | None = None,
    progress: Progress = no_progress,
    notice: Notice = log_notice,
) -> Board:
    """Makes ready to compare. ``memory`` limits our process; ``out``: where samples are kept (None: the cache folder).

    Raises:
        OptionError: an argument is unknown or out of range.
        ContextLengthError: the context is too small for a task or too large for the model.
        DocumentError, ModelError, DownloadError, StorageError: a file cannot be had.
    """
    order.check()
    methods = find_methods(order.methods)
    peer, no_peer = None, ""
    if any(method.kv_type for method in methods):
        try:
            peer = find_peer(model, cache_dir, progress, notice)
        except (OptionError, ModelError) as error:  # not installed, or not a file that it reads
            no_peer = str(error)
    ground = lay_ground(
        model, context=order.context, text=order.text, threads=threads, out=out, cache_dir=cache_dir,
        peer=peer, progress=progress, notice=notice,
    )  # fmt: skip
    ground = replace(ground, notice=_silent)
    entries = tuple(_entries(methods, order, ground, memory, no_peer))
    sides = [entry.side for entry in entries]
    evaluations = {each.suite: evaluate(ground, each, sides) for each in order.orders}

    def open_side(side: Side) -> Runner:
        side.check(threads)
        return ground.open_side(side, order.context)

    return Board(order, ground, entries, evaluations, open_side)


def _silent(_text: str, /) -> None:
    """What a model says of each conversation, its plan, is in the table."""


def _entries(
    methods: Sequence[Method], order: BoardOrder, ground: Ground, memory: str | int | None, no_peer: str
) -> Iterator[Entry]:
    """The full cache, then budget by budget, then llama.cpp, which is slow."""
    lacks = {}
    records = find_records(ground.package)
    for method in methods:
        needed = [name for name in calibrations_used(method.side(None), METHODS) if name not in records]
        remedies = "; ".join(f"satchel calibrate MODEL --method {name}" for name in needed)
        lacks[method.name] = f"not calibrated: {remedies}" if needed else no_peer if method.kv_type else ""
    fixed = [Entry(method, None, method.side(None, memory), lacks[method.name])
             for method in methods if not method.has_budget]  # fmt: skip
    yield from (entry for entry in fixed if not entry.method.kv_type)
    for share in order.budgets:
        budget = Budget.of(share, order.context, ground.package.spec.kv_bytes_per_token)
        for method in methods:
            if method.has_budget:
                yield Entry(method, budget, method.side(budget, memory), lacks[method.name])
    yield from (entry for entry in fixed if entry.method.kv_type)


def _rounds(items: Sequence[Item]) -> list[list[Item]]:
    """The first item of each task, the second of each, and so on."""
    numbers: dict[str, Iterator[int]] = {}
    rounds: dict[int, list[Item]] = {}
    for item in items:
        rounds.setdefault(next(numbers.setdefault(item.task, count())), []).append(item)
    return [rounds[number] for number in sorted(rounds)]


