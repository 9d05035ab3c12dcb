"""The process that measures one side once: a job comes in on standard input, JSON lines go out.

It is started by its file, not as a part of the package, and imports nothing of ours but the engine that the
job names: the peer's peak of memory must not hold our libraries (40 MB of them). For a look at what one
measurement says, ``python -m satchel.runtime.bench.worker`` works as well.

Both engines are driven and timed by the same lines below; an engine module has
``open_engine(job, notice) -> Engine``.

Job, one line: ``engine`` (a module's name, or the path of a .py file), ``path`` (the caller's ``sys.path``),
``ids``, ``threads``, ``decode_tokens``, ``options`` (for the engine alone). Lines out:
``{"progress": [stage, done, total]}``, ``{"notice": text}``, and at the end ``{"result": …}`` or
``{"error": text, "kind": name of the exception, "is_ours": bool, "smallest_bytes": number or null}``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

PARENT_GONE = 3  # exit code


class Engine(Protocol):
    """One side, loaded: a runtime with a model and room for the job's tokens."""

    def prefill(self, ids: Sequence[int], progress: Callable[[str, int, int], object]) -> Any:
        """Reads ``ids``; the logits after the last one, an array of floats."""

    def step(self, token: int) -> Any:
        """Reads one more token; the logits after it."""

    def kv_bytes(self) -> int:
        """Bytes of the keys and values that it holds now, in every tier."""

    def settings(self) -> dict[str, Any]:
        """What a reader must know to judge the figures: version, precision, sizes of batches and the like."""


def main() -> int:
    """Reads the job, measures, reports. Exit code 0, also for an error that was reported."""
    say = _take_standard_output()
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    sys.path[:] = job["path"]
    try:
        say(result=measure(find_engine(job["engine"]), job, say))
    except Exception as error:
        kind = type(error).__name__
        details = {"smallest_bytes": getattr(error, "smallest_bytes", None)}
        say(error=" ".join(str(error).split()) or kind, kind=kind, is_ours=_is_ours(error), **details)
    return 0


def measure(module: ModuleType, job: dict[str, Any], say: Callable[..., None]) -> dict[str, Any]:
    """One measurement. Seconds run from the first token read; loading is not in them."""
    engine: Engine = module.open_engine(job, lambda text: say(notice=text))
    begun = time.perf_counter()
    row = engine.prefill(job["ids"], lambda stage, done, total: say(progress=[stage, done, total]))
    read = time.perf_counter()
    token = int(row.argmax())
    first = time.perf_counter()
    for _ in range(job["decode_tokens"]):  # whatever the tokens are: an end token does not end a measurement
        token = int(engine.step(token).argmax())
    done = time.perf_counter()
    return {
        "prefill_tokens_per_second": len(job["ids"]) / (read - begun),
        "decode_tokens_per_second": job["decode_tokens"] / (done - first),
        "ttft_seconds": first - begun,
        "kv_bytes": engine.kv_bytes(),
        "settings": engine.settings(),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def find_engine(name: str) -> ModuleType:
    """The module of that name, or of that file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    return _load_file(Path(name))


def peak_rss_bytes() -> int:
    """The most that this process ever held in RAM, file-backed pages included; as in ``devices.machine``."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    # it needs nothing else of ours
    platforms = _load_file(Path(__file__).parents[2] / "devices" / "platforms.py")
    return int(platforms.peak_resident_bytes())


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_ours(error: Exception) -> bool:
    return any(kind.__name__ == "SatchelError" for kind in type(error).__mro__)


def _take_standard_output() -> Callable[..., None]:
    """A function that prints a JSON line; what others write to standard output goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    return say


def _end_with_the_parent() -> None:
    """Standard input stays open as long as the parent lives: a killed parent leaves no worker behind."""
    while os.read(0, 1024):
        pass
    os._exit(PARENT_GONE)


if __name__ == "__main__":
    sys.exit(main())
