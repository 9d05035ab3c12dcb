"""What the disk under a folder can do: how fast it reads, how large a read should be, how much is free.

Measured, not looked up: a few megabytes are written, then read at random aligned places in sizes of 4 to 256 KiB and
once in order, past the system's file cache where it allows that (``O_DIRECT``). It takes less than half a second and
is remembered in the cache folder, per device, for a month.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .remembered import remember, remembered

READ_SIZES = tuple(1 << power for power in range(12, 19))  # 4 KiB to 256 KiB
FILE_BYTES = 8 << 20
SECONDS_PER_SIZE = 0.03
MOST_READS = 128
SEQUENTIAL_BYTES = 1 << 20
GOOD_SHARE = 0.8  # of the best bandwidth: larger reads fetch more than was asked for and gain little
VALID_SECONDS = 30 * 24 * 3600.0
DEFAULT_SHARE = 10  # of the free space, when nobody names a limit


@dataclass(frozen=True)
class Flash:
    """Reading from one device. ``latency_seconds`` of a read of 4 KiB; bytes per second in order.

    ``is_direct``: the system's file cache was left out; else the figures are those of the cache, at best.
    """

    bandwidth: float
    latency_seconds: float
    best_page_bytes: int
    is_direct: bool
    random_bandwidths: tuple[tuple[int, float], ...] = ()  # (bytes of a read, bytes per second)

    def seconds(self, read_bytes: float, reads: float = 1) -> float:
        """How long ``reads`` reads of ``read_bytes`` in all take, one after the other."""
        return reads * self.latency_seconds + read_bytes / self.bandwidth


CAUTIOUS = Flash(bandwidth=200e6, latency_seconds=200e-6, best_page_bytes=64 << 10, is_direct=False)
"""A slow flash drive: what is assumed where nothing can be measured."""


def disk_free(folder: Path) -> int:
    """Free bytes on the disk of ``folder``, which need not exist yet; 0 when it cannot be told."""
    try:
        return shutil.disk_usage(_existing(folder)).free
    except OSError:
        return 0


def default_disk_limit(folder: Path) -> int:
    """What may be written to the disk of ``folder`` when nobody says: a tenth of what is free."""
    return disk_free(folder) // DEFAULT_SHARE


def flash_of(folder: Path, cache_folder: Path, *, now: float | None = None) -> Flash:
    """Figures of the device under ``folder``: remembered in ``cache_folder``, else measured; `CAUTIOUS` if neither."""
    moment = time.time() if now is None else now
    place = _existing(folder)
    try:
        file = cache_folder / "devices" / f"flash-{place.stat().st_dev:x}.json"
    except OSError:
        return CAUTIOUS
    found = _recall(file, moment)
    if found is None:
        try:
            found = measure_flash(place)
        except OSError:  # read-only, full: the archive will say so when it is written
            return CAUTIOUS
        remember(file, asdict(found), now=moment)
    return found


def measure_flash(folder: Path) -> Flash:
    """Measures the device under ``folder`` with a file of `FILE_BYTES`, which is removed again.

    Raises:
        OSError: the folder cannot take the file.
    """
    descriptor, name = tempfile.mkstemp(prefix=".satchel-tmp-flash-", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            block = random.Random(0).randbytes(SEQUENTIAL_BYTES)  # some devices compress
            for _ in range(FILE_BYTES // SEQUENTIAL_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        with _opened(path) as (opened, is_direct):
            rates = [(size, _random_rate(opened, size)) for size in READ_SIZES]
            in_order = _rate(opened, SEQUENTIAL_BYTES, range(0, FILE_BYTES, SEQUENTIAL_BYTES))
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    best = max(in_order, *(rate for _, rate in rates))
    return Flash(in_order, READ_SIZES[0] / rates[0][1], best_page_bytes(rates, best), is_direct, tuple(rates))


def best_page_bytes(rates: list[tuple[int, float]], best: float) -> int:
    """The smallest read that reaches `GOOD_SHARE` of the ``best`` bandwidth, or the largest that was tried."""
    return next((size for size, rate in rates if rate >= GOOD_SHARE * best), rates[-1][0])


def _random_rate(descriptor: int, size: int) -> float:
    places = list(range(0, FILE_BYTES, size))
    random.Random(size).shuffle(places)
    return _rate(descriptor, size, places[:MOST_READS])


def _rate(descriptor: int, size: int, places: list[int] | range) -> float:
    """Bytes per second of reads of ``size`` at ``places``, as many as fit into `SECONDS_PER_SIZE` (at least one)."""
    done, begun = 0, time.perf_counter()
    with mmap.mmap(-1, size) as buffer:  # aligned to a page, as direct reads must be
        for place in places:
            done += _read(descriptor, buffer, place)
            spent = time.perf_counter() - begun
            if spent > SECONDS_PER_SIZE:
                break
    return done / max(spent, 1e-9)


def _read(descriptor: int, buffer: mmap.mmap, place: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], place)
    os.lseek(descriptor, place, os.SEEK_SET)  # Windows
    return len(os.read(descriptor, len(buffer)))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, bool]]:
    """A descriptor to read from, and whether it goes past the system's file cache."""
    direct = getattr(os, "O_DIRECT", 0)
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    descriptor, is_direct = -1, False
    if direct:
        with contextlib.suppress(OSError):  # file systems in memory know no direct reads
            descriptor = os.open(path, flags | direct)
            with mmap.mmap(-1, READ_SIZES[0]) as buffer:
                _read(descriptor, buffer, 0)
            is_direct = True
    if not is_direct:
        if descriptor >= 0:
            os.close(descriptor)
        descriptor = os.open(path, flags)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        yield descriptor, is_direct
    finally:
        os.close(descriptor)


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest folder around it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _recall(path: Path, now: float) -> Flash | None:
    """What was measured not long ago; None for anything else, whatever the file holds."""
    value = remembered(path, valid_seconds=VALID_SECONDS, now=now)
    try:
        rates = tuple((int(size), float(rate)) for size, rate in (value or {})["random_bandwidths"])
        found = Flash(**{**(value or {}), "random_bandwidths": rates})
        sound = 0 < found.bandwidth < math.inf and 0 <= found.latency_seconds < math.inf
    except (ValueError, TypeError, KeyError):
        return None
    return found if sound and found.best_page_bytes in READ_SIZES else None
