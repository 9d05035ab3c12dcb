"""What a disk can do: measured within bounds, remembered for a month, and never a reason to fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from satchel.devices import flash
from satchel.devices.flash import CAUTIOUS, READ_SIZES, Flash, best_page_bytes, default_disk_limit, disk_free, flash_of

MONTH = 30 * 24 * 3600


def test_it_measures(tmp_path: Path) -> None:
    found = flash.measure_flash(tmp_path)
    assert found.bandwidth > 0
    assert found.latency_seconds > 0
    assert found.best_page_bytes in READ_SIZES
    assert [size for size, _ in found.random_bandwidths] == list(READ_SIZES)
    assert all(rate > 0 for _, rate in found.random_bandwidths)
    assert list(tmp_path.iterdir()) == []


def test_it_works_without_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash.os, "O_DIRECT", 0, raising=False)
    assert not flash.measure_flash(tmp_path).is_direct


def planted(monkeypatch: pytest.MonkeyPatch, *found: Flash | OSError) -> list[Path]:
    """`measure_flash` finds these, one after the other; the list gets the folders that were measured."""
    asked: list[Path] = []

    def measure(folder: Path) -> Flash:
        asked.append(folder)
        result = found[len(asked) - 1]
        if isinstance(result, OSError):
            raise result
        return result

    monkeypatch.setattr(flash, "measure_flash", measure)
    return asked


FAST = Flash(2e9, 5e-5, 32768, True, ((4096, 1e8), (8192, 2e8)))
SLOW = Flash(1e8, 5e-3, 262144, False, ((4096, 1e6),))


def test_it_is_remembered_for_a_month(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, cache = planted(monkeypatch, FAST, SLOW, FAST), tmp_path / "cache"
    missing = tmp_path / "not" / "there"
    assert [flash_of(missing, cache, now=now) for now in (1000, 1000 + MONTH - 1)] == [FAST, FAST]
    assert asked == [tmp_path]  # the nearest folder that exists
    assert flash_of(tmp_path, cache, now=1000 + MONTH) == SLOW
    assert flash_of(tmp_path, cache, now=5) == FAST  # a clock that was set back
    assert len(asked) == 3


@pytest.mark.parametrize(
    "change",
    [{"bandwidth": 0}, {"bandwidth": "fast"}, {"bandwidth": float("nan")}, {"latency_seconds": -1}, {"measured": None},
     {"best_page_bytes": 5}, {"random_bandwidths": 3}, {"random_bandwidths": [[1]]}, {"more": 1}, None, []],
    ids=str,
)  # fmt: skip
def test_a_damaged_file_is_measured_again(change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, FAST, SLOW)
    flash_of(tmp_path, tmp_path, now=1000)
    (file,) = (tmp_path / "devices").iterdir()
    value = {**json.loads(file.read_text()), **change} if isinstance(change, dict) else change
    file.write_text(json.dumps(value))
    assert flash_of(tmp_path, tmp_path, now=1001) == SLOW


@pytest.mark.parametrize("text", ["", "{", "[" * 10_000, "\x00"])
def test_a_file_that_is_no_json_is_measured_again(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, FAST, SLOW)
    flash_of(tmp_path, tmp_path, now=1000)
    (file,) = (tmp_path / "devices").iterdir()
    file.write_text(text)
    assert flash_of(tmp_path, tmp_path, now=1001) == SLOW


def test_what_cannot_be_measured_is_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, OSError(28, "full"), FAST)
    assert flash_of(tmp_path, tmp_path) == CAUTIOUS
    assert flash_of(tmp_path, tmp_path) == FAST  # it was not remembered


def test_a_cache_folder_that_refuses_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, FAST)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert flash_of(tmp_path, blocked) == FAST


@pytest.mark.parametrize(
    ("rates", "best", "expected"),
    [
        ([(4096, 80.0), (8192, 100.0)], 100.0, 4096),
        ([(4096, 79.0), (8192, 80.0), (16384, 100.0)], 100.0, 8192),
        ([(4096, 1.0), (8192, 2.0)], 100.0, 8192),
    ],
)
def test_the_best_page(rates: list[tuple[int, float]], best: float, expected: int) -> None:
    assert best_page_bytes(rates, best) == expected


def test_free_space(tmp_path: Path) -> None:
    assert disk_free(tmp_path / "not" / "there") == pytest.approx(disk_free(tmp_path), rel=0.05)
    assert default_disk_limit(tmp_path) == pytest.approx(disk_free(tmp_path) / 10, rel=0.05)


def test_seconds() -> None:
    assert FAST.seconds(2e9, 1000) == pytest.approx(1 + 0.05)
