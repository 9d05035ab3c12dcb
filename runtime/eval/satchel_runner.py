"""Our runtime as a side of an evaluation: as ``satchel ask`` would read and answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...devices.reporting import Notice, Progress
from ..context import Context
from ..engines import Cancelled
from ..model import load
from .sides import Reply, Side, Talk
from .task import Question, Sample


class SatchelRunner:
    """One loaded model, a new conversation for each sample."""

    def __init__(self, package: Path, side: Side, *, threads: int, notice: Notice) -> None:
        self._model = load(
            str(package), memory=side.memory, policy=side.policy, kv=side.kv, threads=threads, cache=False,
            engine=side.engine, notice=notice,
        )  # fmt: skip
        self._stop = threading.Event()
        self._kv: Mapping[str, int] = {}
        self._plan: Mapping[str, int | str | None] = {}

    @property
    def vocab(self) -> int:
        return self._model.package.spec.vocab

    def talk(self, sample: Sample, progress: Progress) -> Talk:
        with self._model.read_text(sample.document, progress=self._watched(progress)) as context:
            tokens = context.tokens
            replies = tuple(self._ask(context, question) for question in sample.questions)
            return Talk(tokens, context.read_seconds, replies, context.kv, self._planned(context))

    def walk(self, ids: Sequence[int], positions: Sequence[int], progress: Progress) -> Iterator[NDArray[np.float32]]:
        watched = self._watched(progress)
        with self._model.open_context(len(ids)) as context:
            first = positions[0] + 1
            row = context.prefill(ids[:first], watched)
            assert row is not None, "there is at least one token"
            yield row
            for last, position in pairwise(positions):
                for begin in range(last + 1, position + 1, context.plan.chunk):
                    watched("reading", begin, len(ids))
                    row = context.append(ids[begin : min(begin + context.plan.chunk, position + 1)])
                yield row
            self._kv, self._plan = context.kv, self._planned(context)

    def kv(self) -> Mapping[str, int]:
        return self._kv

    def plan(self) -> Mapping[str, int | str | None]:
        return self._plan

    def cancel(self) -> None:
        self._stop.set()
        self._model.engine.cancel()

    def close(self) -> None:
        self._model.close()

    def _ask(self, context: Context, question: Question) -> Reply:
        pieces = list[str]()
        for piece in context.stream(question.text, max_new_tokens=question.max_new_tokens, temperature=0):
            pieces.append(piece)
            self._check()
        self._check()
        answer = context.last_answer
        assert answer is not None, "the stream has ended"
        usage = answer.usage
        if usage.finish_reason == "cancelled":  # by a run that ended before the wish was seen here
            raise Cancelled("the evaluation was stopped")
        rate = usage.decode_tokens_per_second
        seconds = (usage.new_tokens - 1) / rate if rate else 0.0
        return Reply("".join(pieces), usage.new_tokens, usage.ttft_seconds, seconds, usage.finish_reason)

    def _planned(self, context: Context) -> dict[str, int | str | None]:
        """What the planner chose, or was told."""
        plan = context.plan
        settings = self._model.settings_of(plan)
        found: dict[str, int | str | None] = {
            "placement": plan.placement, "chunk": plan.chunk, "hot_tokens": plan.hot_tokens
        }  # fmt: skip
        if plan.hot_tokens is not None:
            found |= {"sinks": settings.sinks, "window": settings.window}
        if plan.codec is not None:
            found |= {"codec": plan.codec, "retriever": plan.retriever, "recall_tokens": plan.recall_tokens}
        return found

    def _watched(self, progress: Progress) -> Progress:
        def watched(stage: str, done: int, total: int, /) -> None:
            self._check()
            progress(stage, done, total)

        return watched

    def _check(self) -> None:
        if self._stop.is_set():
            raise Cancelled("the evaluation was stopped")
