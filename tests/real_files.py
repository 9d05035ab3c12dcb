"""Real models and documents for tests marked ``real``, for benchmarks and for people: fetched once, kept.

Run ``python tests/real_files.py`` to fetch everything ahead. The files lie in ``$SATCHEL_TEST_CACHE``, else
in ``~/.cache/satchel-tests``. Documents come out of Debian packages; the machine needs apt and dpkg.
"""

from __future__ import annotations

import gzip
import itertools
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from satchel.devices.files.file_lock import file_lock
from satchel.devices.files.safe_write import make_folder, scratch_folder
from satchel.export.hub import all_models, fetch

WINDOW_TABLE_OFFSET = 0x54  # of bible.data: window size, count, then count + 1 offsets, all big-endian uint32
COMPRESS_MAGIC = b"\x1f\x9d\x90"  # of the Unix program compress; the data file has it once, not per window


class MissingFileError(Exception):
    """A real file cannot be had on this machine."""


def real_files_folder() -> Path:
    """The folder that keeps real files between test runs."""
    named = os.environ.get("SATCHEL_TEST_CACHE")
    return Path(named).absolute() if named else Path.home() / ".cache" / "satchel-tests"


def real_model(name: str) -> Path:
    """The .gguf of a registry model. Raises: SatchelError."""
    return fetch(name, cache_dir=real_files_folder(), notice=_say)


def real_document(name: str) -> Path:
    """A long document: one of ``DOCUMENTS``. Raises: MissingFileError."""
    if name not in DOCUMENTS:
        raise MissingFileError(f"no document is called {name!r}; there are {', '.join(DOCUMENTS)}")
    folder = make_folder(real_files_folder() / "documents")
    final = folder / name
    with file_lock(folder / f".{name}.lock", f"unpacking {name}"):
        if not final.exists():
            recipe = DOCUMENTS[name]
            with scratch_folder(folder) as scratch:
                tree = _unpack_package(recipe.package, scratch)
                source = tree / recipe.member
                if not source.exists():
                    raise MissingFileError(f"the Debian package {recipe.package} has no {recipe.member}")
                recipe.convert(source, scratch / "result")
                (scratch / "result").replace(final)
    return final


@dataclass(frozen=True)
class Recipe:
    """Where a document is inside a Debian package, and how it becomes what a reader opens."""

    package: str
    member: str
    convert: Callable[[Path, Path], object]


def _gunzip(source: Path, result: Path) -> None:
    result.write_bytes(gzip.decompress(source.read_bytes()))


def _copy_folder(source: Path, result: Path) -> None:
    shutil.copytree(source, result, symlinks=False, ignore_dangling_symlinks=True)


def _unpack_bible(source: Path, result: Path) -> None:
    """The text is in windows, each a stream of the Unix program ``compress`` without its magic."""
    data = source.read_bytes()
    _, windows = struct.unpack_from(">2I", data, WINDOW_TABLE_OFFSET)
    offsets = struct.unpack_from(f">{windows + 1}I", data, WINDOW_TABLE_OFFSET + 8)
    with result.open("wb") as text:
        for start, end in itertools.pairwise(offsets):
            stream = COMPRESS_MAGIC + data[start:end]
            text.write(subprocess.run(["gzip", "-dc"], input=stream, capture_output=True, check=True).stdout)


_POLICY = "usr/share/doc/debian-policy"
DOCUMENTS = {
    "policy.txt": Recipe("debian-policy", f"{_POLICY}/policy.txt.gz", _gunzip),
    "policy.html": Recipe("debian-policy", f"{_POLICY}/policy.html", _copy_folder),  # a folder of pages
    "policy.pdf": Recipe("debian-policy", f"{_POLICY}/policy.pdf.gz", _gunzip),
    "policy.epub": Recipe("debian-policy", f"{_POLICY}/policy.epub", shutil.copyfile),
    "bible.txt": Recipe("bible-kjv-text", "usr/lib/bible.data", _unpack_bible),
}


def _unpack_package(package: str, scratch: Path) -> Path:
    """Fetches a Debian package and unpacks it; nothing is installed."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise MissingFileError(f"{program} is missing: the real documents come from Debian packages")
    try:
        _run("apt-get", "download", package, folder=scratch)
    except MissingFileError:  # a fresh machine or container has no package lists
        _run("apt-get", "update", folder=scratch)
        _run("apt-get", "download", package, folder=scratch)
    archives = list(scratch.glob("*.deb"))
    if len(archives) != 1:
        raise MissingFileError(f"apt-get download {package} left {len(archives)} .deb files")
    _run("dpkg", "-x", str(archives[0]), "tree", folder=scratch)
    return scratch / "tree"


def _run(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise MissingFileError(f"{' '.join(command)}: {last[0]}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    """Fetches every supported model and every document, and prints the paths."""
    for model in all_models():
        if model.supported:
            print(real_model(model.name))
    for name in DOCUMENTS:
        print(real_document(name))


if __name__ == "__main__":
    main()
