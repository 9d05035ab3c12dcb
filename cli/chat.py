"""``satchel chat``: a conversation over documents. Ctrl-C stops the answer, not the program."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator

import click

from ..devices.sizes import format_size
from ..errors import SatchelError
from .interrupts import Stopped
from .options import CommonOptions, common_options
from .session import AnswerText, Session, require_documents

PROMPT = "> "
HELP = """\
/help   this list
/kv     where the KV cache is and how large
/reset  forget the questions and answers, keep the documents
/quit   leave, as Ctrl-D does
Ctrl-C stops an answer. Everything else is a question."""

EPILOG = """\b
Examples:
  satchel chat manual.pdf
  satchel chat src/ --memory 1.5GB
  satchel chat manual.pdf < questions.txt > answers.txt
"""


@click.command("chat", epilog=EPILOG, short_help="Talk about documents, question after question.")
@click.argument("documents", nargs=-1, metavar="[DOC...]")
@common_options
def command(documents: tuple[str, ...], options: CommonOptions) -> None:
    """Read documents and answer questions about them, each with the ones before it in mind; without a
    document, just talk to the model.

    Ctrl-C stops an answer; Ctrl-D, /quit, or Ctrl-C at the prompt leave; /help lists more. Questions can also
    be piped in, one a line.
    """
    if "-" in documents:
        raise click.UsageError(
            "- would take the questions' standard input for a document: save that to a file, or use "
            "'satchel ask'",
            click.get_current_context(silent=True),
        )
    require_documents(documents)
    session = Session(options, documents)
    session.begin()
    if sys.stdin.isatty():
        _interactive(session)
    else:
        _piped(session)


def _piped(session: Session) -> None:
    """One question a line; the first error ends it, for nobody is there to decide."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    text = AnswerText()
    for line in sys.stdin:
        if line.strip() and not _obey(session, line.strip(), text):
            return


def _interactive(session: Session) -> None:
    with contextlib.suppress(ImportError):  # not on every platform; it brings editing of lines, and history
        import readline  # noqa: F401
    tokens, seconds = session.context.tokens, session.context.read_seconds
    about = f"{tokens:,} tokens read in {seconds:.1f} s. " if tokens else ""
    session.notice(f"{about}/help lists commands; Ctrl-D leaves.")
    for line in _lines():
        try:
            if not _obey(session, line, AnswerText()):
                return
        except Stopped:
            session.notice("(stopped)")
        except SatchelError as error:  # one question failed; the next may not
            session.notice(f"satchel: {' '.join(str(error).split())}")


def _lines() -> Iterator[str]:
    """What a person types, until Ctrl-D or Ctrl-C at the prompt."""
    while True:
        try:
            line = _prompt()
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return
        if line.strip():
            yield line.strip()


def _prompt() -> str:
    if sys.stdout.isatty():
        return input(PROMPT)
    click.echo(PROMPT, nl=False, err=True)  # standard output, which goes elsewhere, carries answers only
    return input()


def _obey(session: Session, line: str, text: AnswerText) -> bool:
    """Does what a line says; False to leave."""
    if line in ("/quit", "/exit"):
        return False
    if line == "/help":
        session.notice(HELP)
    elif line == "/kv":
        session.notice(_describe_kv(session))
    elif line == "/reset":
        session.begin()
        session.notice("(the questions and answers are forgotten)")
    elif line.startswith("/") and line[1:].isalpha():
        session.notice(f"{line} is no command; /help lists them")
    else:
        _answer(session, line, text)
    return True


def _answer(session: Session, question: str, text: AnswerText) -> None:
    text.begin()
    try:
        # Patience without limit: an answer stops at the next operator, and the conversation must stay whole.
        answer = session.answer(question, text.write, patience_seconds=None)
    finally:
        text.end()
    session.tell_if_cut(answer)


def _describe_kv(session: Session) -> str:
    kv = session.context.kv
    tiers = ((tier, kv[f"{tier}_bytes"]) for tier in ("hot", "warm", "cold", "digest"))
    sizes = ", ".join(f"{format_size(size)} {tier}" for tier, size in tiers if size or tier == "hot")
    return (
        f"{kv['total_tokens']:,} tokens, {kv['hot_tokens']:,} of them hot for each head (policy "
        f"{session.context.policy}): {sizes}; memory limit {format_size(session.model.options.memory_bytes)}"
    )
