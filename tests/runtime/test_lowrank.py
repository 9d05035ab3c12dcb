"""Low rank from the settings to the archive: what it costs, what it changes, and snapshots of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import satchel
from satchel.cache.codecs import find_codec
from satchel.cache.lowrank import bytes_per_token
from satchel.errors import ModelError, OptionError
from satchel.export.calibration.lowrank import Projections, write_lowrank
from satchel.export.exporter import export_model
from satchel.export.package import Package, open_package

TEXT = "The filter is cleaned every second week, says the manual of the pump in room 7. " * 14
KV: dict[str, Any] = {"hot_tokens": 192, "window": 128, "sinks": 64, "chunk": 128}
QUESTION = "What is cleaned?"


@pytest.fixture
def calibrated(tiny_gguf: Callable[..., Path], tmp_path: Path) -> Callable[..., Package]:
    """``calibrated(seed)``: a package with random orthogonal projections."""

    def make(seed: int = 0, **options: Any) -> Package:
        path = tmp_path / "package"
        source = tiny_gguf(**{"context_length": 4096, **options})
        package = open_package(path) if path.exists() else export_model(source, path)
        spec, rng = package.spec, np.random.default_rng(seed)
        shape = (spec.layers, spec.kv_heads, 2 * spec.head_size, 2 * spec.head_size)
        turns = np.linalg.qr(rng.normal(size=shape))[0].astype(np.float32)
        write_lowrank(package, "cskv", Projections(turns, turns.swapaxes(2, 3)), {"seed": seed})
        return package

    return make


def read(package: Package, kv: dict[str, Any], folder: Path) -> tuple[bool, str, dict[str, int]]:
    """Whether a snapshot was opened, an answer, and the bytes."""
    options: dict[str, Any] = {"kv": {**KV, **kv}, "threads": 1, "cache_dir": folder, "notice": lambda _: None}
    with satchel.load(package.folder, **options) as model, model.read_text(TEXT) as context:
        usage = dict(context.kv)
        planned = context.plan
        assert planned.archive_tokens >= usage["total_tokens"] - usage["hot_tokens"]
        assert usage["warm_bytes"] <= planned.warm_bytes
        return context.reopened, context.ask(QUESTION, max_new_tokens=6).text, usage


@pytest.mark.parametrize("codec", ["q4", "f16"])
@pytest.mark.parametrize("lowrank", ["cskv", "think"])
def test_bytes_are_those_of_the_plan(
    lowrank: str, codec: str, calibrated: Callable[..., Package], tmp_path: Path
) -> None:
    package = calibrated()
    spec, found = package.spec, {}
    for rank in (100, 30):
        settings = satchel.cache.CacheSettings(lowrank=lowrank, rank=rank)
        _, _, usage = read(package, {"codec": codec, "lowrank": lowrank, "rank": rank}, tmp_path / "cache")
        each = bytes_per_token(find_codec(codec), spec.head_size, settings.low_rank)
        archived = (usage["total_tokens"] - KV["window"]) // 64 * 64
        assert usage["warm_bytes"] == archived * spec.layers * spec.kv_heads * each
        found[rank] = usage["warm_bytes"]
    _, _, plain = read(package, {"codec": codec}, tmp_path / "cache")
    assert found[30] < found[100] == plain["warm_bytes"]


def test_of_full_rank_the_answer_is_that_without(calibrated: Callable[..., Package], tmp_path: Path) -> None:
    package = calibrated(types=("Q8_0",))
    answers = [
        read(package, {"codec": "q8", **lowrank}, tmp_path / "cache")[1]
        for lowrank in ({}, {"lowrank": "cskv", "rank": 100}, {"lowrank": "think", "rank": 100})
    ]
    assert answers[0] == answers[1] == answers[2]


def test_snapshots_of_other_ranks_and_calibrations_are_not_opened(
    calibrated: Callable[..., Package], tmp_path: Path
) -> None:
    package, folder = calibrated(), tmp_path / "cache"
    for kv in ({}, {"lowrank": "cskv"}, {"lowrank": "cskv", "rank": 49}, {"lowrank": "think"}):
        first, again = (read(package, {"codec": "q4", **kv}, folder) for _ in range(2))
        assert (first[0], again[0]) == (False, True)
        assert first[1] == again[1]
        assert {key: first[2][key] for key in ("warm_bytes", "hot_tokens", "total_tokens")} == {
            key: again[2][key] for key in ("warm_bytes", "hot_tokens", "total_tokens")
        }
    calibrated(seed=1)
    assert read(package, {"codec": "q4", "lowrank": "cskv"}, folder)[0] is False


def test_layers_with_a_window_have_no_part_in_it(calibrated: Callable[..., Package], tmp_path: Path) -> None:
    package = calibrated(architecture="gemma3")
    spec = package.spec
    full = sum(window == 0 for window in spec.attention_windows)
    assert 0 < full < spec.layers
    _, _, usage = read(package, {"codec": "f16", "lowrank": "cskv"}, tmp_path / "cache")
    archived = (usage["total_tokens"] - KV["window"]) // 64 * 64
    each = bytes_per_token(find_codec("f16"), spec.head_size, satchel.cache.CacheSettings(lowrank="cskv").low_rank)
    assert usage["warm_bytes"] == archived * full * spec.kv_heads * each


def test_a_package_without_calibration(load_tiny: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="has no calibration for cskv; make it once: satchel calibrate MODEL"):
        load_tiny(kv={"lowrank": "cskv"})
    load_tiny(kv={"lowrank": "think"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "full", "kv": {"lowrank": "think"}}, "lowrank=think is for what policy auto archives"),
        ({"policy": "snapkv", "kv": {"lowrank": "cskv"}}, "policy snapkv archives nothing"),
        ({"kv": {"rank": 20}}, "rank=20 is of kv lowrank, which is none; set kv lowrank, too"),
        ({"engine": "llama.cpp", "kv": {"lowrank": "think"}}, "lowrank is not for --engine llama.cpp"),
    ],
)
def test_where_it_has_no_meaning_it_is_refused(
    options: dict[str, Any], message: str, load_tiny: Callable[..., Any]
) -> None:
    with pytest.raises(OptionError, match=message):
        load_tiny(**options)


def test_the_portable_flavour_says_so(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    portable = export_model(tiny_gguf(context_length=4096), tmp_path / "portable", flavour="portable")
    with pytest.raises(OptionError, match="lowrank=think is not available in the portable flavour"):
        satchel.load(portable.folder, kv={"lowrank": "think"}, threads=1, notice=lambda _: None)


def test_a_file_may_bring_it_for_policy_auto(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"satchel.kv.lowrank": "think", "satchel.kv.rank": 30}
    path, told = tiny_gguf(context_length=4096, metadata=keys), list[str]()
    options: dict[str, Any] = {"threads": 1, "cache_dir": tmp_path, "notice": told.append}
    with satchel.load(path, **options) as model:
        settings = model.options.settings
        assert (settings.lowrank, settings.rank) == ("think", 30)
    for policy in ("full", "snapkv"):
        told.clear()
        with satchel.load(path, policy=policy, **options) as model:
            assert model.options.settings.low_rank is None
        assert any("do not apply here: lowrank=think, rank=30" in line for line in told)
