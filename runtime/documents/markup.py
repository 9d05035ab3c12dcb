"""HTML and its kin to readable text, as a parser's target: no tree is built, which saves memory.

Headings become ``#`` lines, list items ``-`` or ``1.`` lines, table rows ``| a | b |`` lines, preformatted
text stays as it is. Scripts, styles, navigation and form controls are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_DROPPED = frozenset(["script", "style", "template", "svg", "iframe", "noscript", "nav"])
_DROPPED |= frozenset(["button", "select", "datalist", "textarea"])
_DROPPED_ROLES = frozenset(["navigation", "search", "menu", "menubar", "toolbar"])
_PAGE_BLOCKS = [
    "address",
    "article",
    "aside",
    "body",
    "details",
    "dialog",
    "div",
    "footer",
    "header",
    "html",
    "main",
]
_TEXT_BLOCKS = [
    "blockquote",
    "center",
    "figcaption",
    "figure",
    "hr",
    "p",
    "pre",
    "section",
    "summary",
    "title",
]
_LIST_BLOCKS = ["dd", "dl", "dt", "fieldset", "form", "legend", "li", "ol", "ul"]
_TABLE_BLOCKS = ["caption", "table", "tbody", "td", "tfoot", "th", "thead", "tr"]
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_BLOCKS = frozenset([*_PAGE_BLOCKS, *_TEXT_BLOCKS, *_LIST_BLOCKS, *_TABLE_BLOCKS, *_HEADINGS])
_TIGHT = frozenset(["item", "row"])  # kinds that follow their like without a blank line


@dataclass
class _Block:
    kind: str  # "text", "item", "heading", "pre", "row"
    text: str


@dataclass
class _Table:
    outer: list[_Block]
    cells: list[list[_Block]] = field(default_factory=list)
    headers: int = 0  # header cells of the row at hand
    rows: int = 0


class TextBuilder:
    """Target of an lxml parser (``start``, ``end``, ``data``, ``close``); ``text()`` has the result.

    Args:
        keep_navigation: for a page that has nothing else.
    """

    def __init__(self, *, keep_navigation: bool = False) -> None:
        self._keep_navigation = keep_navigation
        self._blocks: list[_Block] = []
        self._line: list[str] = []
        self._dropped_depth = 0
        self._pre_depth = 0
        self._heading = ""
        self._marker = ""  # of a list item whose first line is still to come
        self._indents: list[str] = []
        self._lists: list[int | None] = []  # last number given out, None for bullets
        self._tables: list[_Table] = []
        self._title: str | None = None

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        """An element begins."""
        tag = tag.rpartition("}")[2].lower()
        if self._dropped_depth or self._is_dropped(tag, attributes):
            self._dropped_depth += 1
            return
        if tag in _BLOCKS:
            self.flush()
        if tag in _HEADINGS:
            self._heading = _HEADINGS[tag]
        elif tag == "br":
            self._line.append("\n")
        elif tag == "img":
            self.data(f" [{alt}] " if (alt := attributes.get("alt", "").strip()) else "")
        elif tag == "pre":
            self._pre_depth += 1
        elif tag in ("ul", "ol"):
            self._lists.append(_number(attributes.get("start"), 1) - 1 if tag == "ol" else None)
        elif tag == "li":
            self._start_item(attributes)
        elif tag in ("dd", "blockquote"):
            self._indents.append("    ")
        elif tag == "table":
            self._tables.append(_Table(self._blocks))
        elif tag in ("td", "th") and self._tables:
            table = self._tables[-1]
            table.headers += tag == "th"
            table.cells.append([])
            self._blocks = table.cells[-1]

    def end(self, tag: str) -> None:
        """An element ends; parsers close in the order of opening."""
        tag = tag.rpartition("}")[2].lower()
        if self._dropped_depth:
            self._dropped_depth -= 1
            return
        if tag == "title":
            self._take_title()
        if tag in _BLOCKS:
            self.flush()
        if tag in _HEADINGS:
            self._heading = ""
        elif tag == "pre":
            self._pre_depth -= 1
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()
        elif tag in ("li", "dd", "blockquote") and self._indents:
            self._indents.pop()
            self._marker = ""
        elif tag in ("td", "th") and self._tables:
            self._blocks = self._tables[-1].outer
        elif tag == "tr" and self._tables:
            self._end_row(self._tables[-1])
        elif tag == "table" and self._tables:
            self._end_row(self._tables[-1])
            self._tables.pop()

    def data(self, data: str) -> None:
        """Text between tags, entities already decoded."""
        if not self._dropped_depth and data:
            self._line.append(data if self._pre_depth else data.replace("\n", " "))

    def comment(self, text: str) -> None:
        """Comments are not text."""

    def pi(self, target: str, data: str | None = None) -> None:
        """Processing instructions are not text."""

    def close(self) -> None:
        """The input ended."""
        self.flush()
        while self._tables:
            self._end_row(self._tables.pop())

    def text(self) -> str:
        """All text so far; the page's title comes first if no heading says the same."""
        blocks = self._blocks
        first_heading = next((block.text.lstrip("# ") for block in blocks if block.kind == "heading"), None)
        pieces: list[str] = []
        if self._title and blocks and first_heading is None:
            pieces += [f"# {self._title}", "\n\n"]
        for before, block in zip([None, *blocks], blocks, strict=False):
            if before is not None:
                pieces.append("\n" if before.kind == block.kind and block.kind in _TIGHT else "\n\n")
            pieces.append(block.text)
        return "".join(pieces)

    def flush(self) -> None:
        """Ends the line or paragraph at hand."""
        if not self._line:
            return
        raw, self._line = "".join(self._line).replace("\xad", ""), []
        if self._pre_depth:
            lines = raw.replace("\r\n", "\n").strip("\n").split("\n")
        else:
            lines = [" ".join(line.split()) for line in raw.strip().split("\n")]
        if not any(line.strip() for line in lines):
            return
        kind = "item" if self._marker else "text"
        if self._pre_depth or self._heading:
            kind = "pre" if self._pre_depth else "heading"
        if self._heading:
            lines = [self._heading + " ".join(lines)]
        indent = "".join(self._indents)
        first = indent
        if self._marker:
            first = indent[: len(indent) - len(self._marker)] + self._marker
            self._marker = ""
        text = "\n".join((indent + line).rstrip() for line in lines)
        self._blocks.append(_Block(kind, first + text[len(indent) :]))

    def _is_dropped(self, tag: str, attributes: Mapping[str, str]) -> bool:
        if tag in _DROPPED:
            return not (tag == "nav" and self._keep_navigation)
        if "hidden" in attributes or attributes.get("aria-hidden") == "true":
            return True
        if tag == "a" and "headerlink" in attributes.get("class", "").split():  # the pilcrow after a heading
            return True
        return attributes.get("role") in _DROPPED_ROLES and not self._keep_navigation

    def _take_title(self) -> None:
        title, self._line = " ".join("".join(self._line).split()), []
        self._title = self._title or title

    def _start_item(self, attributes: Mapping[str, str]) -> None:
        last = self._lists[-1] if self._lists else None
        if last is None:
            self._marker = "- "
        else:
            number = self._lists[-1] = _number(attributes.get("value"), last + 1)
            self._marker = f"{number}. "
        self._indents.append(" " * len(self._marker))

    def _end_row(self, table: _Table) -> None:
        """A row of plain cells becomes one line; cells with structure (layout tables) stay as they are."""
        self._blocks, cells, headers = table.outer, table.cells, table.headers
        table.cells, table.headers = [], 0
        if not any(cells):
            return
        blocks = [block for cell in cells for block in cell]
        if len(cells) == 1 or any(block.kind in ("pre", "heading", "row") for block in blocks):
            self._blocks += blocks
            return
        texts = [" ".join(" ".join(block.text for block in cell).split()) for cell in cells]
        self._blocks.append(_Block("row", "| " + " | ".join(texts) + " |"))
        table.rows += 1
        if table.rows == 1 and headers == len(cells):
            self._blocks.append(_Block("row", "|" + " --- |" * len(cells)))


def _number(text: str | None, default: int) -> int:
    """A list number from an attribute; nonsense and absurd values give ``default``."""
    digits = (text or "").strip()
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else default
