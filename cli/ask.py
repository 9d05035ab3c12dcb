"""``satchel ask``: reads documents, answers one or more questions about them, and leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NoReturn

import click

from ..runtime import Answer
from .options import CommonOptions, common_options
from .session import AnswerText, Session, require_documents

EPILOG = """\b
Examples:
  satchel ask manual.pdf "How is the filter cleaned?"
  satchel ask src/ notes.md --question "What starts the server?" --question "Who calls it?"
  pdftotext report.pdf - | satchel ask - "What was decided?" --memory 1.2GB
  satchel ask manual.pdf "How is the filter cleaned?" --json | jq -r .answer
  satchel ask notes.md "Who was there?" --model model.gguf --engine llama.cpp --kv storage=q8_0
"""


@click.command("ask", epilog=EPILOG, short_help="Ask questions about documents.")
@click.argument("arguments", nargs=-1, metavar='DOC... "QUESTION"')
@click.option("-q", "--question", "questions", multiple=True, metavar="TEXT",
              help="A question, repeatable; all other arguments are documents then. Each is answered by "
                   "itself, as if it were the only one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per question, one a line.")
@common_options
def command(
    arguments: tuple[str, ...], questions: tuple[str, ...], as_json: bool, options: CommonOptions
) -> None:  # fmt: skip
    """Answer a QUESTION about documents: text, Markdown, HTML, PDF, EPUB, DOCX, source code, folders of
    these, and - for standard input.

    The answer goes to standard output as it is made. Several documents are read as one text, in the given
    order.
    """
    documents, asked = _split(arguments, questions)
    require_documents(documents)
    session = Session(options, documents)
    text = AnswerText()
    for question in asked:
        session.begin()
        if as_json:
            answer = session.answer(question, _nothing)
            click.echo(json.dumps(describe(question, answer, session)))
            session.tell_if_cut(answer)
        else:
            _print_answer(session, question, text, alone=len(asked) == 1)


def describe(question: str, answer: Answer, session: Session) -> dict[str, object]:
    """One answer as ``ask --json`` prints it. The names are a contract: other programs read them."""
    usage = answer.usage
    return {
        "question": question, "answer": answer.text, "model": session.model.name,
        "prompt_tokens": usage.prompt_tokens, "new_tokens": usage.new_tokens, "reopened": usage.reopened,
        "read_seconds": round(usage.read_seconds, 4), "ttft_seconds": round(usage.ttft_seconds, 4),
        "decode_tokens_per_second": round(usage.decode_tokens_per_second, 3),
        "peak_rss_bytes": usage.peak_rss_bytes, "kv": usage.kv, "policy": usage.policy,
        "finish_reason": usage.finish_reason,
    }  # fmt: skip


def _print_answer(session: Session, question: str, text: AnswerText, *, alone: bool) -> None:
    text.begin()
    if not alone and sys.stderr.isatty():
        session.notice(f"> {question}")
    try:
        answer = session.answer(question, text.write)
    finally:
        text.end()
    session.tell_if_cut(answer)


def _split(arguments: tuple[str, ...], questions: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Documents and questions of the command line. Raises click.UsageError when one is missing."""
    if questions:
        documents, asked = list(arguments), list(questions)
    elif not arguments:
        _refuse('no document and no question: satchel ask DOC... "QUESTION"')
    elif arguments[-1] == "-" or _exists(arguments[-1]):
        _refuse(
            f"{arguments[-1]!r} is a document, and no question follows: put the question last, or give it by "
            "--question"
        )
    else:
        documents, asked = list(arguments[:-1]), [arguments[-1]]
    if not documents:
        _refuse('no document: satchel ask DOC... "QUESTION" (satchel chat works without one)')
    if not all(question.strip() for question in asked):
        _refuse("the question is empty: ask something")
    # Bytes of the command line that are no text, which Python keeps as lone surrogates, fit into no output.
    return documents, [question.encode("utf-8", "replace").decode() for question in asked]


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # longer than a path may be, or an unknown ~user
        return False


def _nothing(piece: str) -> None:
    """Shows no pieces: with --json the answer is printed whole."""


def _refuse(message: str) -> NoReturn:
    raise click.UsageError(message, click.get_current_context(silent=True))
