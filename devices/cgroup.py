"""Control groups of Linux: what a container or service may use, whatever the machine has.

Version 1 and 2, nested groups, and the mounts as the process sees them. Every function takes ``root``, the
folder that stands for ``/``: tests hand in a made-up tree. What cannot be read counts as "no limit".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
# Version 1 has no word for "unlimited", it shows the largest page count; no machine has an exbibyte.
_UNLIMITED_BYTES = 2**60


@dataclass(frozen=True)
class GroupMemory:
    """Memory of one control group, in bytes.

    ``usage_bytes`` leaves out file pages that the kernel drops on demand (``inactive_file``): a model file
    that was read once must not look like memory that is gone.
    """

    limit_bytes: int
    usage_bytes: int

    @property
    def room_bytes(self) -> int:
        return max(0, self.limit_bytes - self.usage_bytes)


def read_text(path: Path) -> str:
    """The text of ``path``, or nothing when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def group_memory(root: Path = ROOT) -> GroupMemory | None:
    """The group with the least room among ours and those around it; None when no group has a limit."""
    levels = [level for folder, version in _folders("memory", root) if (level := _memory(folder, version))]
    return min(levels, key=lambda level: level.room_bytes, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the tightest group may use; None when no group has a quota."""
    quotas = [quota for folder, version in _folders("cpu", root) if (quota := _quota(folder, version))]
    return min(quotas, default=None)


def _memory(folder: Path, version: int) -> GroupMemory | None:
    limit_name, usage_name, cache_name = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    limit = _integer(read_text(folder / limit_name))
    usage = _integer(read_text(folder / usage_name))
    if limit is None or limit >= _UNLIMITED_BYTES:
        return None
    cached = re.search(rf"^{cache_name} ([0-9]+)$", read_text(folder / "memory.stat"), re.MULTILINE)
    return GroupMemory(limit, max(0, (usage or 0) - (int(cached[1]) if cached else 0)))


def _quota(folder: Path, version: int) -> float | None:
    if version == 2:
        words = read_text(folder / "cpu.max").split()
    else:
        words = [read_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = (_integer(word) for word in words) if len(words) == 2 else (None, None)
    return quota / period if quota and period and quota > 0 and period > 0 else None


def _folders(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """Our group's folder and those around it up to the mount, with the version; both may be mounted."""
    groups = _groups(controller, root)
    for mount, inside, version in _mounts(controller, root):
        if version not in groups:
            continue
        # In a container without a namespace of its own the path starts with the mount's root; with one, or
        # when it leads out of what is mounted ("/.."), the mount itself is all that we can see.
        group = PurePosixPath(groups[version])
        relative = group.relative_to(inside) if group.is_relative_to(inside) else PurePosixPath()
        parts = () if ".." in relative.parts else relative.parts
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth]), version


def _groups(controller: str, root: Path) -> dict[int, str]:
    """Version -> path of our group, from lines such as ``4:memory:/a/b`` (version 1) and ``0::/a/b`` (2)."""
    groups: dict[int, str] = {}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            groups[2] = path
        elif controller in controllers.split(","):
            groups[1] = path
    return groups


def _mounts(controller: str, root: Path) -> Iterator[tuple[Path, str, int]]:
    """Folder, root inside of the hierarchy, and version of each mount that may hold ``controller``."""
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        place, _, kind = line.partition(" - ")
        fields, words = place.split(), kind.split()
        if len(fields) < 5 or len(words) < 3:
            continue
        is_second = words[0] == "cgroup2"
        if is_second or (words[0] == "cgroup" and controller in words[2].split(",")):
            yield root / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3]), 2 if is_second else 1


def _unescaped(text: str) -> str:
    r"""Mount tables write spaces and the like as ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:  # "max", or a file that is not there
        return None
