"""Work in a thread of its own that Ctrl-C stops, whenever it comes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from satchel.cli import interrupts


def counting(stop: threading.Event) -> Iterator[int]:
    """Numbers until ``stop``; a person who waits for the end in vain presses Ctrl-C at a hundred."""
    for number in range(100):
        if stop.wait(0.05):
            return
        yield number
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process there")
def test_ctrl_c_is_seen_when_its_handler_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the wait in which Ctrl-C came is over before Python's handler has run."""
    press = interrupts._Presses.__call__

    def late(presses: interrupts._Presses, number: int, frame: object) -> None:
        time.sleep(2 * interrupts.POLL_SECONDS)
        press(presses, number, None)

    monkeypatch.setattr(interrupts._Presses, "__call__", late)
    stop, seen = threading.Event(), []
    pressing = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    pressing.start()

    def work() -> int:
        seen.extend(counting(stop))
        return len(seen)

    ended: BaseException | None = None
    try:
        interrupts.run(work, stop.set)
    except KeyboardInterrupt as error:  # its subclass is what is hoped for; the other would end pytest
        ended = error
    pressing.join()
    assert isinstance(ended, interrupts.Stopped)
    assert len(seen) < 100
