"""What was read once is opened the next time: the same answers, only the tail of a longer document, never a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from satchel.cache.snapshots import SnapshotStore
from satchel.devices.files.cache_folder import snapshots_folder
from satchel.runtime import Model

Load = Callable[..., Model]
EXACT: dict[str, Any] = {"types": ("Q8_0",)}
DOCUMENT = "The maintainer uploads. Nobody else may, without consent, in the first week. " * 45
MORE = "Only a team may. " * 40
QUESTION = "Who may upload, and when?"
KINDS = [{"policy": "full"}, {"kv": {"budget_bytes": "400KB"}}, {"policy": "snapkv", "kv": {"hot_tokens": 1024}},
         {"policy": "h2o", "kv": {"hot_tokens": 1024, "head_budgets": "adaptive"}}]  # fmt: skip
NAMES = ["full", "recall", "snapkv", "h2o"]


def snapshots(root: Path) -> list[Path]:
    return sorted(snapshots_folder(root).rglob("*.satchel"))


@pytest.mark.parametrize("options", KINDS, ids=NAMES)
def test_a_reopened_document_answers_as_before(load_tiny: Load, tmp_path: Path, options: dict[str, Any]) -> None:
    answers = []
    for reopened in (False, True, True):
        calls: list[tuple[object, ...]] = []
        model = load_tiny(EXACT, cache_dir=tmp_path, **options)
        with model.read_text(DOCUMENT, progress=lambda *told, calls=calls: calls.append(told)) as context:
            assert context.reopened is reopened
            assert bool(calls) is not reopened
            answers.append(context.ask(QUESTION, max_new_tokens=40, temperature=9.0, seed=3).text)
    assert answers[0]
    assert answers == answers[:1] * 3
    assert len(snapshots(tmp_path)) == 1


@pytest.mark.parametrize("options", KINDS[:2], ids=["full", "recall"])
def test_of_a_longer_document_only_the_tail_is_read(load_tiny: Load, tmp_path: Path, options: dict[str, Any]) -> None:
    load_tiny(EXACT, cache_dir=tmp_path, **options).read_text(DOCUMENT).close()
    starts: list[int] = []
    model = load_tiny(EXACT, cache_dir=tmp_path, **options)
    with model.read_text(DOCUMENT + MORE, progress=lambda _s, done, _t: starts.append(done)) as context:
        assert context.reopened
        assert starts[0] >= len(DOCUMENT) * 8 // 10  # nearly every byte is a token here
        assert starts[-1] == context.tokens
    assert len(snapshots(tmp_path)) == 2


def test_ways_to_forget_have_snapshots_of_their_own(load_tiny: Load, tmp_path: Path) -> None:
    kinds: list[dict[str, object]] = [{}, {"head_budgets": "adaptive"}, {"merge": "lookm"}]
    for more, reopened in zip(kinds * 2, [False] * 3 + [True] * 3, strict=True):
        kv = {"hot_tokens": 1024, **more}
        with load_tiny(EXACT, cache_dir=tmp_path, policy="h2o", kv=kv).read_text(DOCUMENT) as context:
            assert context.reopened is reopened
    assert len(snapshots(tmp_path)) == 3


def test_no_cache_neither_opens_nor_writes(load_tiny: Load, tmp_path: Path) -> None:
    load_tiny(EXACT, cache_dir=tmp_path, cache=False).read_text(DOCUMENT).close()
    assert snapshots(tmp_path) == []
    load_tiny(EXACT, cache_dir=tmp_path).read_text(DOCUMENT).close()
    with load_tiny(EXACT, cache_dir=tmp_path, cache=False).read_text(DOCUMENT) as context:
        assert not context.reopened


@pytest.mark.parametrize("options", KINDS, ids=NAMES)
def test_a_damaged_snapshot_is_told_of_and_read_again(
    load_tiny: Load, tmp_path: Path, options: dict[str, Any]
) -> None:  # fmt: skip
    load_tiny(EXACT, cache_dir=tmp_path, **options).read_text(DOCUMENT).close()
    (path,) = snapshots(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 0x40
    path.write_bytes(data)
    notices: list[str] = []
    model = load_tiny(EXACT, cache_dir=tmp_path, notice=notices.append, **options)
    with model.read_text(DOCUMENT) as context:
        assert not context.reopened
        assert context.ask(QUESTION, max_new_tokens=5).usage.new_tokens
    assert any(path.name in line for line in notices)


@pytest.mark.parametrize("sinks", [-5, 1 << 40, "many", None])
def test_settings_out_of_range_in_a_snapshot_are_refused(
    load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sinks: object
) -> None:  # fmt: skip
    original = SnapshotStore.save

    def save(self: SnapshotStore, *arguments: Any, extra: dict[str, Any], **more: Any) -> Path:
        return original(self, *arguments, extra={**extra, "sinks": sinks}, **more)

    monkeypatch.setattr(SnapshotStore, "save", save)
    options: dict[str, Any] = {"kv": {"budget_bytes": "400KB"}, "cache_dir": tmp_path}
    load_tiny(EXACT, **options).read_text(DOCUMENT).close()
    notices: list[str] = []
    with load_tiny(EXACT, notice=notices.append, **options).read_text(DOCUMENT) as context:
        assert not context.reopened
    assert any("snapshot" in line for line in notices)
