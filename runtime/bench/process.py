"""Runs one measurement in a process of its own, and makes plain errors of whatever happens to it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ... import errors
from ...devices.reporting import Notice, Progress

WORKER = Path(__file__).with_name("worker.py")
PATIENCE_SECONDS = 10  # for a worker that has said its last word
KILLED = -9  # exit code on POSIX: what a system out of memory does


def run_worker(job: Mapping[str, Any], *, label: str, progress: Progress, notice: Notice) -> dict[str, Any]:
    """The worker's ``result`` for ``job`` (see ``worker.py``). Whatever ends the wait ends the worker, too.

    Raises:
        SatchelError: of the kind that the worker met, or it died.
    """
    line = json.dumps({**job, "path": sys.path}) + "\n"
    with tempfile.TemporaryFile() as complaints:
        worker = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints
        )
        try:
            message = _talk(worker, line.encode(), progress, notice)
            code = worker.wait(PATIENCE_SECONDS) if message else worker.wait()
        except subprocess.TimeoutExpired:  # its last word is said; some library hangs in its clean-up
            code = 0
        finally:
            _end(worker)
        if message is None:
            raise errors.SatchelError(_obituary(label, code, complaints))
    if "error" in message:
        raise _error(label, message)
    result: dict[str, Any] = message["result"]
    return result


def _talk(
    worker: subprocess.Popen[bytes], job: bytes, progress: Progress, notice: Notice
) -> dict[str, Any] | None:
    """Sends the job, passes on what the worker says; its last word, or None when it ended without one."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(job)
        worker.stdin.flush()  # and left open: the worker ends when this process does
    except BrokenPipeError:
        return None
    for line in worker.stdout:
        message: dict[str, Any] = json.loads(line)
        if "progress" in message:
            progress(*message["progress"])
        elif "notice" in message:
            notice(message["notice"])
        else:
            return message
    return None


def _end(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is None:
        worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:  # what it did not read of the job
            continue


def _error(label: str, message: Mapping[str, Any]) -> errors.SatchelError:
    """What the worker raised: the same error when it is one of ours."""
    kind, text = getattr(errors, message["kind"], None), message["error"]
    if not message["is_ours"]:
        return errors.ModelError(f"the {label} measurement failed: {text}")
    if kind is errors.MemoryLimitError:
        return errors.MemoryLimitError(text, smallest_bytes=message["smallest_bytes"])
    return kind(text) if kind is not None else errors.SatchelError(text)


def _obituary(label: str, code: int, complaints: IO[bytes]) -> str:
    remedy = "take a smaller --context"
    if code == KILLED:
        why = "was killed (signal 9), most likely for want of memory"
        return f"the {label} measurement {why}; {remedy} or free some memory"
    complaints.seek(0)
    lines = complaints.read().decode("utf-8", "replace").strip().splitlines()
    last = f": {lines[-1].strip()[:200]}" if lines else ""
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the {label} measurement {how} before it had a result{last}; {remedy}, or report it as a bug"
