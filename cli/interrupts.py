"""Work that Ctrl-C stops at once.

A signal handler of Python runs in the main thread, between two bytecodes: while that thread is inside a
graph run, a tokenizer or a PDF reader, Ctrl-C would wait for it. So the work is done in a thread of its own,
and the main thread only shows what comes and looks every few hundredths of a second whether it shall stop.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeAlias, TypeVar

T = TypeVar("T")
# Not a SimpleQueue: a signal during the last moments of its get(timeout=...) makes that wait for ever (Python 3.11).
_Arrived: TypeAlias = "queue.Queue[tuple[T] | BaseException | None]"

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 1.0  # to wait after Ctrl-C for work that cannot be cancelled, such as parsing a PDF
_WORKER = "satchel-worker"


class Stopped(KeyboardInterrupt):
    """Ctrl-C, and the work has ended cleanly: what it worked on may be used further."""


class _Presses:
    """Counts Ctrl-C. The first asks the work to stop; the second does not wait for it."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt


def follow(
    items: Iterable[T],
    cancel: Callable[[], object],
    show: Callable[[T], object],
    *,
    patience_seconds: float | None = PATIENCE_SECONDS,
) -> None:
    """Iterates over ``items`` in a thread of their own and calls ``show`` with each, in this one.

    Args:
        cancel: asks the work to stop, from this thread; called again and again until it has.
        patience_seconds: how long to wait then before leaving the work alone; None: until a second Ctrl-C.

    Raises:
        Stopped: Ctrl-C was pressed and the work has ended.
        KeyboardInterrupt: Ctrl-C was pressed and the work goes on (`work_is_left`): leave the program.
        Exception: what the work or ``show`` raised.
    """
    arrived: _Arrived[T] = queue.Queue()
    worker = threading.Thread(target=_work, args=(items, arrived), name=_WORKER, daemon=True)
    with _count_presses() as presses:
        try:
            worker.start()
            end = _show_until_the_end(arrived, presses, cancel, show, patience_seconds)
        except BaseException:  # ours: a closed pipe, a second Ctrl-C
            _stop(worker, cancel)
            raise
    worker.join()
    if presses.count:
        raise Stopped from end
    if end is not None:
        raise end


def run(work: Callable[[], T], cancel: Callable[[], object]) -> T:
    """The result of ``work``, done as by `follow`, which says what is raised."""
    results: list[T] = []
    follow(_once(work), cancel, results.append)
    return results[0]


def work_is_left() -> bool:
    """Whether a thread still works that was asked to stop: exit without the usual clean-up then."""
    return any(thread.name == _WORKER for thread in threading.enumerate())


def _once(work: Callable[[], T]) -> Iterator[T]:
    yield work()


def _work(items: Iterable[T], arrived: _Arrived[T]) -> None:
    try:
        for item in items:
            arrived.put((item,))
    except BaseException as error:
        arrived.put(error)
    else:
        arrived.put(None)


def _show_until_the_end(
    arrived: _Arrived[T],
    presses: _Presses,
    cancel: Callable[[], object],
    show: Callable[[T], object],
    patience_seconds: float | None,
) -> BaseException | None:
    """Shows items until the work ends; the error that it ended with, if any."""
    deadline: float | None = None
    while True:
        if presses.count:
            cancel()
            if patience_seconds is not None:
                deadline = deadline or time.monotonic() + patience_seconds
        try:
            item = arrived.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if deadline is not None and time.monotonic() > deadline:
                raise KeyboardInterrupt from None
            continue
        if not isinstance(item, tuple):
            return item
        show(item[0])


def _stop(worker: threading.Thread, cancel: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while worker.is_alive() and time.monotonic() < deadline:
        cancel()
        worker.join(POLL_SECONDS)


@contextmanager
def _count_presses() -> Iterator[_Presses]:
    """Takes Ctrl-C over; threads other than the main one get no signals, so there is nothing to take."""
    presses = _Presses()
    if threading.current_thread() is not threading.main_thread():
        yield presses
        return
    before = signal.signal(signal.SIGINT, presses)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)
