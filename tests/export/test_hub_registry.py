"""The hub without its sources: the registry."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from satchel.errors import ModelError
from satchel.export.hub import DEFAULT_MODEL, all_models, fetch, find
from satchel.export.hub.registry import REGISTRY_PATH, parse_registry


def test_registry_lists_the_three_models_default_first() -> None:
    assert [entry.name for entry in all_models()] == [DEFAULT_MODEL, "smollm2-135m-instruct", "gemma-3-270m"]
    assert find(DEFAULT_MODEL).architecture == "qwen2"
    assert find(DEFAULT_MODEL).context_tokens == 32768
    assert len(find(DEFAULT_MODEL).index) == 6


def test_unknown_name_suggests_and_lists() -> None:
    with pytest.raises(ModelError, match=r"'SmolLM2-135m': did you mean smollm2-135m-instruct\? .*gemma-3"):
        find("SmolLM2-135m")


def test_unsupported_architecture_is_refused_before_any_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = replace(find("gemma-3-270m"), supported=False, architecture="mamba")
    known = (find(DEFAULT_MODEL), strange)
    for module in ("registry", "download"):
        monkeypatch.setattr(f"satchel.export.hub.{module}.all_models", lambda: known)
    with pytest.raises(ModelError, match=r"mamba, which this version does not run; choose one of qwen2.5"):
        fetch("gemma-3-270m", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"bytes": -1}, "bytes is -1, not a number above 0"),
    ({"bytes": True}, "bytes is True"),
    ({"bytes": 5}, "its members have 491400064 bytes, the model 5"),
    ({"name": "../up"}, "does not match"),
    ({"sha256": "abc"}, "sha256 'abc' does not match"),
    ({"kind": "chatty"}, "kind 'chatty' is none of instruct, base"),
    ({"supported": "yes"}, "supported is 'yes', not true or false"),
    ({"colour": "red"}, "missing or unknown colour"),
    ({"licence": ""}, "licence is '', not a text"),
    ({"hub": []}, "is list, not an object"),
    ({"index": {}}, "index is dict, not a list"),
])
def test_registry_refuses(change: dict[str, object], message: str) -> None:
    raw = json.loads(REGISTRY_PATH.read_text())
    raw["models"][0] |= change
    with pytest.raises(ModelError, match=message):
        parse_registry(json.dumps(raw))


def test_registry_refuses_a_name_twice_and_text_that_is_not_json() -> None:
    raw = json.loads(REGISTRY_PATH.read_text())
    raw["models"].append(raw["models"][1])
    with pytest.raises(ModelError, match="'smollm2-135m-instruct' 2 times"):
        parse_registry(json.dumps(raw))
    with pytest.raises(ModelError, match="not JSON"):
        parse_registry("{")
