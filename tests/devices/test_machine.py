"""Made-up machines: a folder stands for ``/`` and holds the few files that are read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from satchel.devices import machine
from satchel.devices.cgroup import GroupMemory, cpu_quota, group_memory

KB, MB, GB = 1024, 1024**2, 1024**3
UNLIMITED_V1 = "9223372036854771712"
V2_MOUNT = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "30 23 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs mode=755\n"
    "35 30 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
    "36 30 0:33 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "41 30 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """16 GB of RAM, 10 GB of it available, 8 CPUs, a process of 300 MB, no control groups."""
    figures = f"MemTotal: {16 * MB} kB\nMemFree: {1 * MB} kB\nMemAvailable: {10 * MB} kB\n"
    put(tmp_path, "proc/meminfo", figures)
    put(
        tmp_path,
        "proc/self/status",
        "Name:\tpython\nVmHWM:\t  512000 kB\nVmRSS:\t  307200 kB\nRssAnon:\t  204800 kB\n"
        "RssFile:\t  98304 kB\nRssShmem:\t    4096 kB\nCpus_allowed_list:\t0-5,8,10\n",
    )
    put(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Example CPU 9 @ 3.00GHz \nflags\t: avx2\n")
    return tmp_path


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def second(root: Path, group: str, limit: object, usage: object = 0, inactive_file: int = 0) -> None:
    folder = f"sys/fs/cgroup{group}"
    put(root, f"{folder}/memory.max", f"{limit}\n")
    put(root, f"{folder}/memory.current", f"{usage}\n")
    put(root, f"{folder}/memory.stat", f"anon 1\nactive_file 7\ninactive_file {inactive_file}\nslab 5\n")


def first(root: Path, group: str, limit: object, usage: object = 0, inactive_file: int = 0) -> None:
    folder = f"sys/fs/cgroup/memory{group}"
    put(root, f"{folder}/memory.limit_in_bytes", f"{limit}\n")
    put(root, f"{folder}/memory.usage_in_bytes", f"{usage}\n")
    put(root, f"{folder}/memory.stat", f"inactive_file 3\ntotal_inactive_file {inactive_file}\n")


def mount(root: Path, mounts: str, groups: str) -> None:
    put(root, "proc/self/mountinfo", mounts)
    put(root, "proc/self/cgroup", groups)


def test_the_plain_machine(root: Path) -> None:
    assert machine.memory_total(root) == 16 * GB
    assert machine.memory_available(root) == 10 * GB
    assert machine.cores_usable(root) == 8
    assert machine.cpu_name(root) == "Example CPU 9 @ 3.00GHz"
    assert machine.peak_rss_bytes(root) == 512_000 * KB
    assert machine.resident_memory(root) == machine.ResidentMemory(200 * MB, 96 * MB, 4 * MB)
    assert machine.resident_memory(root).total_bytes == 300 * MB
    assert group_memory(root) is None
    assert cpu_quota(root) is None


def test_second_version_group_with_a_limit(root: Path) -> None:
    mount(root, V2_MOUNT, "0::/user.slice/session.scope\n")
    second(root, "/user.slice/session.scope", 2 * GB, 1536 * MB, 512 * MB)
    second(root, "/user.slice", "max", 5 * GB)
    assert group_memory(root) == GroupMemory(2 * GB, 1 * GB)  # dropped on demand: the inactive file pages
    assert machine.memory_available(root) == 1 * GB


def test_the_tightest_of_nested_groups_counts(root: Path) -> None:
    mount(root, V2_MOUNT, "0::/a/b/c\n")
    second(root, "/a/b/c", 4 * GB, 1 * GB)
    second(root, "/a/b", "max", 1 * GB)
    second(root, "/a", 6 * GB, 5 * GB)  # others in the same group took it
    assert machine.memory_available(root) == 1 * GB


def test_a_machine_with_less_than_the_group_allows(root: Path) -> None:
    mount(root, V2_MOUNT, "0::/a\n")
    second(root, "/a", 64 * GB, 1 * GB)
    assert machine.memory_available(root) == 10 * GB


def test_max_is_no_limit(root: Path) -> None:
    mount(root, V2_MOUNT, "0::/a\n")
    second(root, "/a", "max", 3 * GB)
    assert group_memory(root) is None


def test_over_the_limit_leaves_no_room(root: Path) -> None:
    mount(root, V2_MOUNT, "0::/a\n")
    second(root, "/a", 1 * GB, 2 * GB)
    assert machine.memory_available(root) == 0


def test_container_namespace_shows_its_own_group_as_the_mount(root: Path) -> None:
    mount(root, V2_MOUNT, "0::/\n")
    second(root, "", 3 * GB, 1 * GB)
    assert machine.memory_available(root) == 2 * GB


def test_first_version_with_nested_groups(root: Path) -> None:
    mount(root, V1_MOUNTS, "4:memory:/docker/abc\n3:cpuacct,cpu:/docker/abc\n0::/\n")
    first(root, "/docker/abc", 2 * GB, 1 * GB, 256 * MB)
    first(root, "/docker", 8 * GB, 2 * GB)
    first(root, "", UNLIMITED_V1, 12 * GB)
    assert group_memory(root) == GroupMemory(2 * GB, 768 * MB)
    assert machine.memory_available(root) == 2 * GB - 768 * MB


def test_first_version_unlimited(root: Path) -> None:
    mount(root, V1_MOUNTS, "4:memory:/a\n")
    first(root, "/a", UNLIMITED_V1, 1 * GB)
    first(root, "", UNLIMITED_V1, 2 * GB)
    assert machine.memory_available(root) == 10 * GB


def test_container_whose_mount_starts_inside_of_the_hierarchy(root: Path) -> None:
    mounts = "35 30 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    mount(root, mounts, "4:memory:/docker/abc/worker\n")
    first(root, "/worker", 2 * GB, 1 * GB)
    first(root, "", 3 * GB, 2560 * MB)
    assert machine.memory_available(root) == 512 * MB


@pytest.mark.parametrize("group", ["/../elsewhere", "/not/there", "/docker/other"])
def test_a_group_that_cannot_be_seen_falls_back_to_the_mount(root: Path, group: str) -> None:
    mount(root, V2_MOUNT, f"0::{group}\n")
    second(root, "", 3 * GB, 1 * GB)
    assert machine.memory_available(root) == 2 * GB


def test_a_mount_point_with_a_space(root: Path) -> None:
    mount(root, "29 23 0:26 / /sys/fs/my\\040groups rw - cgroup2 cgroup2 rw\n", "0::/\n")
    put(root, "sys/fs/my groups/memory.max", str(3 * GB))
    put(root, "sys/fs/my groups/memory.current", str(1 * GB))
    assert machine.memory_available(root) == 2 * GB


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"/a/cpu.max": "250000 100000"}, 2),  # 2.5 CPUs
        ({"/a/cpu.max": "max 100000", "/cpu.max": "300000 100000"}, 3),
        ({"/a/cpu.max": "20000 100000"}, 1),  # never none
        ({"/a/cpu.max": "6400000 100000"}, 8),
        ({"/a/cpu.max": "max 100000"}, 8),
        ({"/a/cpu.max": "rubbish"}, 8),
    ],
)
def test_cores_under_a_quota(root: Path, files: dict[str, str], cores: int) -> None:
    mount(root, V2_MOUNT, "0::/a\n")
    for path, text in files.items():
        put(root, f"sys/fs/cgroup{path}", text + "\n")
    assert machine.cores_usable(root) == cores


@pytest.mark.parametrize(("quota", "cores"), [("400000", 4), ("-1", 8)])
def test_cores_under_a_first_version_quota(root: Path, quota: str, cores: int) -> None:
    mount(root, V1_MOUNTS, "4:memory:/a\n3:cpu,cpuacct:/a\n")
    put(root, "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", quota + "\n")
    put(root, "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us", "100000\n")
    assert machine.cores_usable(root) == cores


def test_kernels_without_the_newer_fields(root: Path) -> None:
    put(root, "proc/meminfo", f"MemTotal: {16 * MB} kB\nMemFree: {1 * MB} kB\nCached: {2 * MB} kB\n")
    put(root, "proc/self/status", "VmRSS:\t  40000 kB\n")
    put(root, "proc/self/statm", "9000 5000 2000 1 0 3000 0\n")
    assert machine.memory_available(root) == 3 * GB
    page = machine.page_bytes()
    assert machine.resident_memory(root) == machine.ResidentMemory(3000 * page, 2000 * page)


def test_an_arm_board_is_named_by_its_other_fields(root: Path) -> None:
    put(root, "proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 50\nHardware\t: Boardmaker 7\n")
    assert machine.cpu_name(root) == "Boardmaker 7"
    put(root, "proc/cpuinfo", "")
    assert machine.cpu_name(root)


@pytest.mark.parametrize(
    ("available", "margin"),
    [(10 * GB, 10 * GB // 8), (1 * GB, 256 * MB), (400 * MB, 200 * MB), (0, 0)],
)
def test_default_limit_is_what_we_hold_plus_what_is_free_less_a_margin(
    root: Path, available: int, margin: int
) -> None:
    mount(root, V2_MOUNT, "0::/\n")
    second(root, "", 20 * GB, 20 * GB - available)
    assert machine.default_memory_limit(root) == 200 * MB + available - margin


def test_an_empty_tree_gives_harmless_figures(tmp_path: Path) -> None:
    assert machine.memory_total(tmp_path) == 0
    assert machine.memory_available(tmp_path) == 0
    assert machine.resident_memory(tmp_path).total_bytes == 0
    assert machine.cores_usable(tmp_path) == 1


def test_this_machine() -> None:
    assert machine.cores_usable() >= 1
    assert machine.cpu_name()
    assert machine.page_bytes() & (machine.page_bytes() - 1) == 0
    assert 0 < machine.memory_available() <= machine.memory_total()
    assert 0 < machine.default_memory_limit() <= machine.memory_total()


def test_peak_follows_what_this_process_touches() -> None:
    before = machine.peak_rss_bytes()
    block = bytearray(b"\1") * (before + 32 * MB)  # more than ever before, whatever ran earlier
    held = machine.resident_memory()
    assert machine.peak_rss_bytes() >= before + 32 * MB
    assert held.anon_bytes >= len(block)
    del block
    assert machine.peak_rss_bytes() >= held.total_bytes - 8 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="compares with the counters of Linux")
def test_resident_parts_agree_with_another_reader() -> None:
    import psutil

    total = psutil.Process().memory_info().rss
    assert machine.resident_memory().total_bytes == pytest.approx(total, abs=16 * MB)
