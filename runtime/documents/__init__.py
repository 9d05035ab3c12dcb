"""Documents to text: files of several formats, folders, several sources, standard input.

A new format is one file with a ``FORMAT`` (extensions and a reader) and one entry in ``FORMATS``. Readers
import their libraries when they are first used: the process lives under a hard memory limit, and most runs
need one format.
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import DocumentError
from . import docx, epub, html, pdf, plain, rst
from .encoding import looks_binary
from .folder import walk
from .formats import Format, choose
from .source import MAX_TEXT_BYTES, Report, Source, read_limited, too_large, unreadable

__all__ = ["FORMATS", "Document", "Format", "Part", "read_documents"]

FORMATS: tuple[Format, ...] = (pdf.FORMAT, epub.FORMAT, docx.FORMAT, html.FORMAT, rst.FORMAT, plain.FORMAT)
"""All formats; the last one takes every file whose bytes are text."""

_STANDARD_INPUT = "standard input"
_SKIPPED_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Part:
    """Where one source lies in ``Document.text``: characters ``start`` to ``end``, without its heading."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """What was read, as one text; with several parts, each is headed by a line with its name.

    Attributes:
        text: the only copy of the text.
        spans: the parts in order.
        notices: one line each on what was skipped, guessed or damaged; empty if all is well.
    """

    text: str
    spans: tuple[Part, ...]
    notices: tuple[str, ...] = ()

    @property
    def parts(self) -> list[tuple[str, str]]:
        """(name, text) of each part; cut out of ``text`` at each call."""
        return [(part.name, self.text[part.start : part.end]) for part in self.spans]


@dataclass
class _Collected:
    """Texts on their way into a document."""

    progress: Callable[[str, float], None] | None
    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    chars: int = 0

    def add(self, source: Source) -> None:
        report = Report(source.name, self.progress)
        report.progress(0.0)
        text = _read(source, report)
        self.chars += len(text)
        if self.chars > MAX_TEXT_BYTES:
            raise too_large(source.name if not self.names else "the documents together", MAX_TEXT_BYTES)
        self.names.append(source.name)
        self.texts.append(text)
        self.notices += report.notices
        report.progress(1.0)


def read_documents(
    sources: Sequence[str | Path], *, progress: Callable[[str, float], None] | None = None
) -> Document:
    """Reads files, folders (all text files below, sorted) and ``-`` (standard input), in the given order.

    Args:
        sources: paths; a single file that cannot be read is an error, one inside a folder is a notice.
        progress: called with the source's name and the fraction of it that is read.

    Raises:
        DocumentError: a source is missing, empty, damaged, encrypted, scanned, binary, or too large.
    """
    if not sources:
        raise DocumentError("no document given; name at least one file or folder, or - for standard input")
    if [str(source) for source in sources].count("-") > 1:
        raise DocumentError("- (standard input) is given more than once; it can be read once only")
    collected = _Collected(progress)
    for source in sources:
        try:
            path = Path(source).expanduser()
        except RuntimeError:  # ~name of nobody
            raise DocumentError(f"{source}: there is no such user's folder; check the path") from None
        if str(source) != "-" and _is_folder(path):
            _add_folder(path, collected)
        else:
            collected.add(_open_source(str(source), path))
    return _join(collected)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise unreadable(str(path), error) from error
    except ValueError as error:  # a NUL character in the path
        raise DocumentError(f"{str(path)!r}: not a path; check it") from error


def _open_source(name: str, path: Path) -> Source:
    """Pipes and standard input are read whole, for they come by once; files are opened when they are read."""
    if name == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise DocumentError("- reads standard input, which is a terminal here; pipe a document into it")
        return Source(_STANDARD_INPUT, data=read_limited(sys.stdin.buffer, _STANDARD_INPUT, MAX_TEXT_BYTES))
    if path.is_file():
        return Source(name, path)
    try:
        with path.open("rb") as stream:
            return Source(name, data=read_limited(stream, name, MAX_TEXT_BYTES))
    except OSError as error:
        raise unreadable(name, error) from error


def _read(source: Source, report: Report) -> str:
    """The text of one source, never empty."""
    if source.size_bytes() == 0:
        raise DocumentError(f"{source.name}: is empty (0 bytes); check that it was saved or downloaded whole")
    text = choose(source, FORMATS).read(source, report)
    if not text or text.isspace():
        raise DocumentError(f"{source.name}: has no text, only white space; check that it is the right file")
    return text


def _add_folder(folder: Path, collected: _Collected) -> None:
    """Every readable file; what cannot be read is skipped and told, for a folder is rarely all documents."""
    skipped: list[str] = []
    found = 0
    for relative, path in walk(folder, skipped):
        source = Source(f"{folder.resolve().name}/{relative}", path)
        try:
            if choose(source, FORMATS) is plain.FORMAT and looks_binary(source.head()):
                skipped.append(f"{relative} (binary)")
                continue
            if source.size_bytes() == 0:
                continue
        except DocumentError:
            skipped.append(f"{relative} (permission denied)")
            continue
        try:
            collected.add(source)
            found += 1
        except DocumentError as error:
            if collected.chars > MAX_TEXT_BYTES:
                raise
            collected.notices.append(f"skipped {error}")
    if not found:
        raise DocumentError(f"{folder}: no readable documents in this folder; name the files you mean")
    if skipped:
        shown = ", ".join(skipped[:_SKIPPED_SHOWN])
        more = f" and {len(skipped) - _SKIPPED_SHOWN} more" if len(skipped) > _SKIPPED_SHOWN else ""
        collected.notices.append(f"{folder}: skipped {len(skipped)}: {shown}{more}")


def _join(collected: _Collected) -> Document:
    """One text of all parts; a single document is passed on without a copy."""
    texts, names, notices = collected.texts, collected.names, tuple(collected.notices)
    if len(texts) == 1:
        return Document(texts[0], (Part(names[0], 0, len(texts[0])),), notices)
    return Document("".join(_with_headings(names, texts)), _spans(names, texts), notices)


def _heading(index: int, name: str) -> str:
    return ("\n\n" if index else "") + f"===== {name} =====\n\n"


def _with_headings(names: Sequence[str], texts: Sequence[str]) -> Iterator[str]:
    for index, (name, text) in enumerate(zip(names, texts, strict=True)):
        yield _heading(index, name)
        yield text


def _spans(names: Sequence[str], texts: Sequence[str]) -> tuple[Part, ...]:
    spans: list[Part] = []
    position = 0
    for index, (name, text) in enumerate(zip(names, texts, strict=True)):
        position += len(_heading(index, name))
        spans.append(Part(name, position, position + len(text)))
        position += len(text)
    return tuple(spans)
