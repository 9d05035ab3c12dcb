"""What this machine has, and what this process may take of it: cores, memory, the kernel's page size.

Linux is read from ``/proc`` and the control groups, macOS and Windows through the calls in `platforms`.
Functions take ``root``, the folder that stands for ``/``: with another one they read nothing but files there,
on any system, so that tests can make a machine up.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from . import platforms
from .cgroup import ROOT, cpu_quota, group_memory, read_text

# Kept back from what is free: for the desktop, for other programs and for file pages that make reading fast.
_MARGIN_SHARE = 8
_MARGIN_LEAST_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class ResidentMemory:
    """This process's pages in RAM, in bytes: anonymous (only we can free them), file-backed and shared.

    File-backed pages (mapped weights) count in the total, though the system can drop and re-read them.
    macOS and Windows do not tell them apart: there all pages count as anonymous.
    """

    anon_bytes: int
    file_bytes: int
    shared_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.anon_bytes + self.file_bytes + self.shared_bytes


def cores_usable(root: Path = ROOT) -> int:
    """Threads that can run at once: the CPUs we may run on, within the control group's CPU quota.

    A quota of 2.5 CPUs gives 2: a third spinning thread would use the time up early and then stop them all.
    """
    if _by_calls(root):
        return os.cpu_count() or 1
    affine = _cores_allowed(root)
    quota = cpu_quota(root)
    return max(1, affine if quota is None else min(affine, int(quota)))


def cpu_name(root: Path = ROOT) -> str:
    """The processor's name as its maker writes it; the architecture when it has none."""
    if _by_calls(root):
        return platforms.cpu_name() or platform.machine()
    text = read_text(root / "proc/cpuinfo")
    fields = dict(re.findall(r"^(model name|Model|Hardware)[ \t]*:[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE))
    return fields.get("model name") or fields.get("Model") or fields.get("Hardware") or platform.machine()


def page_bytes() -> int:
    """Size of a page of memory: the granularity of mapped files."""
    return mmap.PAGESIZE


def memory_total(root: Path = ROOT) -> int:
    """RAM of the machine in bytes, whatever the control group allows."""
    if _by_calls(root):
        return platforms.memory_total()
    return _kilobytes(root / "proc/meminfo", "MemTotal") or 0


def memory_available(root: Path = ROOT) -> int:
    """Bytes that this process may still take without swapping or being killed.

    The least of what the machine has available and the room of each control group around us.
    """
    if _by_calls(root):
        return platforms.memory_available()
    meminfo = root / "proc/meminfo"
    available = _kilobytes(meminfo, "MemAvailable")
    if available is None:  # kernels before 3.14
        available = (_kilobytes(meminfo, "MemFree") or 0) + (_kilobytes(meminfo, "Cached") or 0)
    group = group_memory(root)
    return available if group is None else min(available, group.room_bytes)


def resident_memory(root: Path = ROOT) -> ResidentMemory:
    """What this process holds in RAM now."""
    if _by_calls(root):
        return ResidentMemory(anon_bytes=platforms.resident_bytes(), file_bytes=0)
    status = root / "proc/self/status"
    anon, file = _kilobytes(status, "RssAnon"), _kilobytes(status, "RssFile")
    if anon is not None and file is not None:
        return ResidentMemory(anon, file, _kilobytes(status, "RssShmem") or 0)
    pages = [int(word) for word in read_text(root / "proc/self/statm").split()[1:3]]  # resident, shared
    resident, shared = pages if len(pages) == 2 else ((_kilobytes(status, "VmRSS") or 0) // page_bytes(), 0)
    return ResidentMemory((resident - shared) * page_bytes(), shared * page_bytes())


def peak_rss_bytes(root: Path = ROOT) -> int:
    """The most that this process ever held in RAM, file-backed pages included.

    Linux: ``VmHWM``, as ``ru_maxrss`` there survives ``exec`` and so can show the peak of the program that
    started us. Elsewhere ``ru_maxrss``, or the peak working set of Windows.
    """
    peak = None if _by_calls(root) else _kilobytes(root / "proc/self/status", "VmHWM")
    return platforms.peak_resident_bytes() if peak is None else peak


def release_free_memory() -> None:
    """Gives freed but kept memory back to the system (glibc keeps it for later; elsewhere nothing is done)."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def default_memory_limit(root: Path = ROOT) -> int:
    """The limit for the whole process when ``--memory`` is not given, in bytes.

    What this process holds for itself plus what it may still take (machine and control group), less a margin:
    an eighth of what is available, at least 256 MiB, but never more than half of it.
    """
    available = memory_available(root)
    margin = min(max(available // _MARGIN_SHARE, _MARGIN_LEAST_BYTES), available // 2)
    return resident_memory(root).anon_bytes + available - margin


def _by_calls(root: Path) -> bool:
    """Whether the figures come from `platforms`: this very machine, and it has no ``/proc``."""
    return root == ROOT and sys.platform in ("darwin", "win32")


def _cores_allowed(root: Path) -> int:
    """CPUs in ``Cpus_allowed_list`` (``0-3,8``) of our status; 1 when it cannot be read."""
    if sys.platform == "linux" and root == ROOT:
        return len(os.sched_getaffinity(0))
    match = re.search(r"^Cpus_allowed_list:\s*(\S+)", read_text(root / "proc/self/status"), re.MULTILINE)
    ends = [[int(end) for end in span.split("-")] for span in match[1].split(",")] if match else [[0]]
    return sum(span[-1] - span[0] + 1 for span in ends)


def _kilobytes(path: Path, field: str) -> int | None:
    """A line such as ``MemTotal:  24684096 kB``, in bytes; None when there is none."""
    match = re.search(rf"^{field}:\s*([0-9]+)\s*kB", read_text(path), re.MULTILINE)
    return int(match[1]) * 1024 if match else None
