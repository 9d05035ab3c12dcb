"""Stops a model at one of its runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from satchel.runtime import Model
from satchel.runtime.engines import NativeEngine


class Session:
    """Stands before an ONNX Runtime session: calls ``act`` before or after the run with this number."""

    def __init__(self, model: Model, number: int, act: Callable[[], None], *, after: bool = False) -> None:
        assert isinstance(model.engine, NativeEngine)
        self.engine, self.number, self.act, self.after = model.engine, number, act, after
        self.inner = self.engine._session
        self.engine._session = self  # type: ignore[assignment]

    def run(self, *arguments: Any) -> Any:
        self.number -= 1
        if self.number == 0 and not self.after:
            self.act()
        result = self.inner.run(*arguments)
        if self.number == 0 and self.after:
            self.act()
        return result

    def remove(self) -> None:
        self.engine._session = self.inner


def interrupt() -> None:
    raise KeyboardInterrupt
