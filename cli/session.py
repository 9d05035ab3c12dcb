"""The model and the documents of one command: loaded and read behind a progress bar, then asked.

Ctrl-C stops each of these at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import click

from ..devices.reporting import Progress
from ..errors import DocumentError
from ..runtime import Answer, Context
from ..runtime.documents import read_documents
from ..runtime.documents.source import unreadable
from ..runtime.engines import Cancelled
from .interrupts import PATIENCE_SECONDS, follow, run
from .options import CommonOptions
from .progress import ProgressBar, Unit, progress_bar

TEMPLATE_TOKENS = 64  # at most, for what a chat template puts around a question
SPARE_TOKENS = 32  # of an answer, between two looks at the room that is left
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def require_documents(documents: Sequence[str]) -> None:
    """Finds a mistyped path before a model is fetched for it. Raises DocumentError."""
    for name in documents:
        if name != "-":
            try:
                Path(name).expanduser().stat()
            except OSError as error:
                raise unreadable(name, error) from error
            except RuntimeError:  # ~name of nobody
                raise DocumentError(f"{name}: there is no such user's folder; check the path") from None


class Session:
    """A loaded model, and one conversation at a time over the documents; `begin` starts the next one."""

    def __init__(self, options: CommonOptions, documents: Sequence[str]) -> None:
        self.options = options
        self._documents = documents
        self._piped_text: str | None = None  # of standard input, which cannot be read twice
        self._bar: ProgressBar | None = None
        # The conversation just after the documents, never asked; the others are its forks. It is given up
        # when the memory limit has no room for it beside a long one: pruning makes the fork's pages its own.
        self._base: Context | None = None
        self._current: Context | None = None
        with self._progress("bytes") as bar:
            self.model = options.load(progress=bar, notice=self.notice)

    @property
    def context(self) -> Context:
        """The conversation of now; after `begin`."""
        assert self._current is not None
        return self._current

    def notice(self, text: str, /) -> None:
        """Tells the person one line on standard error, above the progress bar."""
        if self._bar is not None:
            self._bar.notice(text)
        else:
            click.echo(text, err=True)

    def begin(self) -> None:
        """Starts a new conversation after the documents, which are read if they are not in memory."""
        is_first = self._current is None
        if self._current is not None:
            self._current.close()
        if self._base is None:
            if not is_first and self._documents:
                self.notice("memory had no room to keep the document beside the answer: reading it again")
            self._base = self._read()
        self._current = self._base.fork()

    def answer(
        self,
        question: str,
        show: Callable[[str], object],
        *,
        patience_seconds: float | None = PATIENCE_SECONDS,
    ) -> Answer:
        """Asks the next question of the conversation; ``show`` gets the answer's pieces as they come.

        Raises:
            Stopped: Ctrl-C was pressed; the conversation goes on after what was said so far.
            SatchelError: as `Context.stream`.
        """
        context = self.context
        follow(self._pieces(context, question), context.cancel, show, patience_seconds=patience_seconds)
        answer = context.last_answer
        assert answer is not None
        return answer

    def tell_if_cut(self, answer: Answer) -> None:
        """Says on standard error why an answer ends early, and how to get more."""
        if answer.usage.finish_reason == "length":
            self.notice(
                f"(the answer was cut at {answer.usage.new_tokens:,} tokens; --max-new-tokens allows more)"
            )
        elif answer.usage.finish_reason == "repetition":
            self.notice("(the answer began to repeat itself and was stopped; --temperature 0.7 may help)")
        elif answer.usage.finish_reason == "memory":
            self.notice("(the answer was cut: the memory limit is reached; raise --memory or use --policy auto)")
        elif answer.usage.finish_reason == "context":
            self.notice(
                f"(the answer was cut: the model's context of {self.model.longest_tokens:,} tokens is full; "
                "give fewer pages)"
            )

    def _pieces(self, context: Context, question: str) -> Iterator[str]:
        self._make_room(context, len(self.model.tokenizer.encode(question)) + TEMPLATE_TOKENS)
        stream = context.stream(question, max_new_tokens=self.options.max_new_tokens, **self.options.sampling)
        for piece in stream:
            yield piece
            self._make_room(context, 0)

    def _make_room(self, context: Context, tokens: int) -> None:
        """Gives the base up when ``tokens`` more and a bit of answer may get the conversation pruned."""
        if self._base is None or context.policy == "recall":  # which prunes without a copy
            return
        if context.kv["hot_tokens"] + tokens + SPARE_TOKENS > context.plan.capacity_tokens:
            self._base.close()
            self._base = None

    def _read(self) -> Context:
        if not self._documents:
            return self.model.read_text("")
        stop = Event()
        with self._progress("tokens") as bar:

            def progress(stage: str, done: int, total: int, /) -> None:
                if stop.is_set():
                    raise Cancelled("reading was cancelled")
                bar(stage, done, total)

            def cancel() -> None:
                stop.set()
                self.model.engine.cancel()

            return run(lambda: self._read_documents(progress), cancel)

    def _read_documents(self, progress: Progress) -> Context:
        if "-" not in self._documents:
            return self.model.read(self._documents, progress=progress)
        if self._piped_text is None:
            read = read_documents(self._documents)
            for line in read.notices:
                self.notice(line)
            self._piped_text = read.text
        return self.model.read_text(self._piped_text, progress=progress)

    @contextmanager
    def _progress(self, unit: Unit) -> Iterator[ProgressBar]:
        with progress_bar(unit) as bar:
            self._bar = bar
            try:
                yield bar
            finally:
                self._bar = None


class AnswerText:
    """Writes answers to standard output piece by piece, with a blank line between two, and ends their last lines."""

    def __init__(self) -> None:
        self._last = "\n"
        self._is_first = True
        self._is_terminal = sys.stdout.isatty()

    def begin(self) -> None:
        """An answer follows."""
        if not self._is_first:
            self.write("\n")
        self._is_first = False

    def write(self, piece: str) -> None:
        """Shows a piece at once; without control characters on a terminal, which a document may plant."""
        text = _CONTROL.sub("", piece) if self._is_terminal else piece
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._last = text[-1]

    def end(self) -> None:
        """The answer is over, for whatever reason."""
        if self._last != "\n":
            self.write("\n")
