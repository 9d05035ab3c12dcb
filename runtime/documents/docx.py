"""Word documents (.docx), streamed from their XML.

Not through python-docx: it loads every picture into memory and leaves out inserted text under change
tracking, content controls, text boxes and footnotes, and what is left out silently makes answers wrong.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from ...errors import DocumentError
from .archive import Archive, holds
from .formats import Format
from .markup import TextBuilder
from .source import Report, Source

_BODY = "word/document.xml"
_NOTES = (("word/footnotes.xml", "Footnotes"), ("word/endnotes.xml", "Endnotes"))
_DROPPED = frozenset(["del", "moveFrom", "Fallback"])  # tracked deletions, and the second copy of a text box
_HEADING = re.compile(r"(?:heading|title|berschrift|titre|titolo|ttulo)\s*([1-9])?$", re.IGNORECASE)


def _attribute(attributes: Mapping[str, str], name: str) -> str:
    """The value of ``w:name``, whatever the namespace of the edition (transitional or strict)."""
    return next((value for key, value in attributes.items() if key.rpartition("}")[2] == name), "")


class _Styles:
    """A parser's target over ``styles.xml``: paragraph style -> heading level 1 to 6, or list and level."""

    def __init__(self) -> None:
        self.levels: dict[str, int] = {}
        self.lists: dict[str, dict[str, str]] = defaultdict(
            dict
        )  # style -> "numId" and "ilvl" where it has them
        self._style = ""

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        name = tag.rpartition("}")[2]
        if name == "style":
            self._style = _attribute(attributes, "styleId")
        elif name == "name" and (match := _HEADING.search(_attribute(attributes, "val"))):
            self.levels.setdefault(self._style, min(int(match[1] or 1), 6))
        elif name == "outlineLvl" and (level := _attribute(attributes, "val")).isdecimal() and int(level) < 9:
            self.levels[self._style] = min(int(level) + 1, 6)
        elif name in ("numId", "ilvl"):
            self.lists[self._style][name] = _attribute(attributes, "val")

    def close(self) -> None:
        """Nothing to do; lxml asks for it."""


class _Numbering:
    """A parser's target over ``numbering.xml``: which levels of which lists show numbers, not bullets."""

    def __init__(self) -> None:
        self._formats: dict[tuple[str, str], str] = {}  # (abstract list, level) -> number format
        self._abstract_of: dict[str, str] = {}  # list -> abstract list
        self._abstract = self._level = self._list = ""

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        name = tag.rpartition("}")[2]
        if name == "abstractNum":
            self._abstract = _attribute(attributes, "abstractNumId")
        elif name == "lvl":
            self._level = _attribute(attributes, "ilvl")
        elif name == "numFmt":
            self._formats[self._abstract, self._level] = _attribute(attributes, "val")
        elif name == "num":
            self._list = _attribute(attributes, "numId")
        elif name == "abstractNumId":
            self._abstract_of[self._list] = _attribute(attributes, "val")

    def close(self) -> None:
        """Nothing to do; lxml asks for it."""

    def counts(self, list_id: str, level: str) -> bool:
        """Whether this level shows numbers."""
        shown = self._formats.get((self._abstract_of.get(list_id, ""), level), "bullet")
        return shown not in ("bullet", "none")


class _Body:
    """A parser's target over body or notes: turns WordprocessingML into calls of a ``TextBuilder``."""

    def __init__(self, builder: TextBuilder, styles: _Styles, numbering: _Numbering) -> None:
        self._builder, self._styles, self._numbering = builder, styles, numbering
        self._counters: dict[str, dict[int, int]] = defaultdict(dict)
        self._dropped_depth = 0
        self._in_text = False
        self._open: list[list[str]] = []  # per paragraph at hand, the builder's elements to close with it
        self._level = self._list = ""
        self._note_mark = ""  # of a note whose text is still to come

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        name = tag.rpartition("}")[2]
        if self._dropped_depth or name in _DROPPED:
            self._dropped_depth += 1
        elif name == "p":
            self._builder.flush()
            self._open.append([])
            self._level = self._list = ""
        elif name == "t":
            self._in_text = True
            self._builder.data(self._note_mark)
            self._note_mark = ""
        elif name in ("tbl", "tr", "tc"):
            self._builder.start({"tbl": "table", "tr": "tr", "tc": "td"}[name], {})
        elif name == "pStyle":
            self._begin_style(_attribute(attributes, "val"))
        elif name == "ilvl":
            self._level = _attribute(attributes, "val")
        elif name == "numId":
            self._list = _attribute(attributes, "val")
        elif name in ("tab", "ptab"):
            self._builder.data("\t" if self._open else "")
        elif name in ("br", "cr"):
            self._builder.start("br", {})
        elif name == "noBreakHyphen":
            self._builder.data("-")
        elif name in ("footnoteReference", "endnoteReference"):
            self._builder.data(f"[{_attribute(attributes, 'id')}]")
        elif name in ("footnote", "endnote"):
            self._note_mark = f"[{_attribute(attributes, 'id')}] "

    def end(self, tag: str) -> None:
        name = tag.rpartition("}")[2]
        if self._dropped_depth:
            self._dropped_depth -= 1
        elif name == "t":
            self._in_text = False
        elif name == "pPr":
            self._begin_item()
        elif name == "p" and self._open:
            self._builder.flush()
            for element in reversed(self._open.pop()):
                self._builder.end(element)
        elif name in ("tbl", "tr", "tc"):
            self._builder.end({"tbl": "table", "tr": "tr", "tc": "td"}[name])

    def data(self, data: str) -> None:
        if self._in_text and not self._dropped_depth:
            self._builder.data(data)

    def close(self) -> None:
        """Nothing to do; lxml asks for it."""

    def _begin(self, element: str, attributes: Mapping[str, str] | None = None) -> None:
        if self._open:
            self._open[-1].append(element)
            self._builder.start(element, attributes or {})

    def _begin_style(self, style: str) -> None:
        if level := self._styles.levels.get(style):
            self._begin(f"h{level}")
        elif style in self._styles.lists:
            self._list = self._styles.lists[style].get("numId", "")
            self._level = self._styles.lists[style].get("ilvl", "")

    def _begin_item(self) -> None:
        """The paragraph's properties are known: one of a list becomes an item, indented by its level."""
        if not self._list or self._list == "0" or (self._open and self._open[-1]):
            return
        depth = min(int(self._level), 8) if self._level.isdecimal() else 0
        for _ in range(depth):
            self._begin("blockquote")
        if not self._numbering.counts(self._list, self._level or "0"):
            self._begin("ul")
            self._begin("li")
            return
        counters = self._counters[self._list]
        number = counters[depth] = counters.get(depth, 0) + 1
        for deeper in [level for level in counters if level > depth]:
            del counters[deeper]
        self._begin("ol")
        self._begin("li", {"value": str(number)})


def read(source: Source, report: Report) -> str:
    """The text of the body with headings, lists and tables, then foot- and endnotes.

    Raises:
        DocumentError: damaged, encrypted, or without text.
    """
    styles, numbering, builder = _Styles(), _Numbering(), TextBuilder()
    with Archive(source, "DOCX") as archive:
        for member, target in (("word/styles.xml", styles), ("word/numbering.xml", numbering)):
            if member in archive:
                archive.parse(member, target)
        archive.parse(_BODY, _Body(builder, styles, numbering), report)
        for member, title in _NOTES:
            if member in archive:
                notes = TextBuilder()
                archive.parse(member, _Body(notes, styles, numbering))
                notes.close()
                if text := notes.text():
                    builder.flush()
                    builder.start("h2", {})
                    builder.data(title)
                    builder.end("h2")
                    builder.start("pre", {})
                    builder.data(text)
                    builder.end("pre")
    builder.close()
    text = builder.text()
    if not text:
        raise DocumentError(f"{source.name}: the DOCX has no text; if its pages are pictures, run OCR first")
    return text


FORMAT = Format("DOCX", (".docx",), read, lambda source, head: holds(source, head, _BODY))
