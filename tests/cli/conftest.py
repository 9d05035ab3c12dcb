"""A tiny model and ways to run the command line on it: in this process, in another one, and on a terminal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from satchel.cli import main

HELPERS = str(Path(__file__).parents[1] / "helpers")
if HELPERS not in sys.path:
    sys.path.insert(0, HELPERS)

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's .gguf, with a context of 4,096 tokens."""
    from tiny_models import write_tiny_gguf

    path: Path = write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context_length=4096)
    return path


@pytest.fixture(scope="session")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that can read and talk for a minute before its context is full."""
    from tiny_models import write_tiny_gguf

    path: Path = write_tiny_gguf(tmp_path_factory.mktemp("patient") / "patient.gguf", context_length=150_000)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder, so that the tiny model is exported once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Nothing of the user's is read or written, and no test waits for a network."""
    monkeypatch.setenv("SATCHEL_CACHE_DIR", str(cache))
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text("The filter is cleaned every second week. " * 10, encoding="utf-8")
    return path


@pytest.fixture
def satchel(tiny: Path) -> Run:
    """``satchel("ask", ...)``: runs a command in this process; ``-m`` of ask and chat is the tiny model."""

    def run(*arguments: object, **more: object) -> Result:
        given = [str(argument) for argument in arguments]
        if given[:1] in (["ask"], ["chat"]) and "-m" not in given:
            given[1:1] = ["-m", str(tiny)]
        result: Result = CliRunner().invoke(main, given, **more)  # type: ignore[arg-type]
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


class Terminal:
    """``python -m satchel`` on a pseudo-terminal: standard input, output and error are all of it."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        import pty

        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "satchel", *arguments],
            stdin=slave, stdout=slave, stderr=slave, cwd=folder, start_new_session=True, close_fds=True,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
            preexec_fn=lambda: _own_terminal(slave),
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def wait_for(self, part: str, seconds: float = 60) -> str:
        """Reads the screen until ``part`` stands there that was not there before; the text up to it."""
        deadline = time.monotonic() + seconds
        while part not in self.text:
            if time.monotonic() > deadline or not self._read(deadline):
                raise AssertionError(f"{part!r} did not come; instead: {self.text!r}")
        before, _, self.text = self.text.partition(part)
        return before

    def send(self, text: str) -> None:
        """Types; "\\x03" is Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self._master, text.encode())

    def leave(self, seconds: float = 60) -> tuple[int, str]:
        """Waits for the end: the exit code and what was on the screen last."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        try:
            return self.process.wait(max(deadline - time.monotonic(), 1)), self.text
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler writes where every thread is
            while self._read(time.monotonic() + 3):
                pass
            raise AssertionError(f"the program did not end in {seconds} s; on the screen: {self.text!r}") from None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._master)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(deadline - time.monotonic(), 0))
        data = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            data = os.read(self._master, 65536) if ready else b""
        self.text += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)


def _own_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """``terminal("chat", ...)``: starts a command on a terminal."""
    pytest.importorskip("pty", reason="pseudo-terminals are of POSIX systems")
    started: list[Terminal] = []

    def start(*arguments: object) -> Terminal:
        started.append(Terminal([str(argument) for argument in arguments], tmp_path))
        return started[-1]

    yield start
    for one in started:
        one.close()
