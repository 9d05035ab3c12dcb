"""How a tiny model speaks: a token a byte, so that sizes are easy to see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from satchel.runtime import Model
from satchel.runtime.eval.haystack import Haystack
from satchel.runtime.eval.sizing import Speaker

LINES = [
    "The miller counted {} sacks of barley before the carriage arrived. Nobody thanked him!",
    "In the {}th winter the harbour froze, although the captains had promised otherwise. Who paid?",
    "Whatever chapter {} demands, careful readers return every volume to its proper shelf.",
]
TEXT = "\n\n".join(line.format(number) for number in range(60) for line in LINES)


@pytest.fixture
def haystack() -> Haystack:
    return Haystack(TEXT)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "haystack.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def speaker(load_tiny: Callable[..., Model]) -> Speaker:
    model = load_tiny()
    return Speaker(model.tokenizer, model.template)
