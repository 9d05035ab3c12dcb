"""Plain text, Markdown, source code: any file whose bytes decode as text is read as it is."""

from __future__ import annotations

from .encoding import decode
from .formats import Format
from .source import Report, Source

# Named so that their content cannot make another format of them; every unknown extension ends here as well.
_EXTENSIONS = (
    ".txt",
    ".md",
    ".markdown",
    ".log",
    ".csv",
    ".json",
    ".py",
    ".c",
    ".h",
    ".cc",
    ".rs",
    ".go",
    ".js",
)


def read(source: Source, report: Report) -> str:
    """The text of a plain file; Markdown keeps its marks, which a model reads well."""
    return decode(source.read_all(), report)


FORMAT = Format("plain text", _EXTENSIONS, read)
