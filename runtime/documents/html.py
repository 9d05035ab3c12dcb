"""HTML and XHTML files; also the parsing that EPUB chapters and rendered reStructuredText share."""

from __future__ import annotations

import re
from html import entities

from ...errors import DocumentError
from .encoding import decode
from .formats import Format
from .markup import TextBuilder
from .source import MIB, Report, Source

_FEED_BYTES = 1 << 16
_MAX_HTML_BYTES = 32 * MIB
_HTML = re.compile(r"\s*(<\?xml[^>]*>\s*)?(<!--.{0,2000}?-->\s*)?<(!doctype\s+html|html)\b", re.I | re.S)
_DECLARED = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]{2,40})""", re.IGNORECASE)
_ENTITY = re.compile(r"&([A-Za-z][A-Za-z0-9]*);")
_XML_ENTITIES = frozenset(["amp", "lt", "gt", "quot", "apos"])


def read(source: Source, report: Report) -> str:
    """The readable text of a page; navigation is kept only when there is nothing else.

    Raises:
        DocumentError: no text.
    """
    data = source.read_all(_MAX_HTML_BYTES)
    declared = _DECLARED.search(data, 0, 4096)
    page = decode(data, report, declared[1].decode("ascii") if declared else None)
    del data
    text = page_text(page, report) or page_text(page, report, keep_navigation=True)
    if not text and page.strip():
        raise DocumentError(
            f"{source.name}: has markup but no text; save it from a browser once it has loaded"
        )
    return text


def page_text(page: str, report: Report | None = None, *, keep_navigation: bool = False) -> str:
    """The text of an HTML or XHTML page.

    XHTML goes to an XML parser first, because HTML parsers take ``<script/>`` for the beginning of a script
    and swallow the rest; what is not well-formed, or declares entities, goes to the forgiving HTML parser.
    """
    from lxml import etree

    if page.lstrip()[:5].lower() == "<?xml" and "<!ENTITY" not in page:
        builder = TextBuilder(keep_navigation=keep_navigation)
        parser = etree.XMLParser(target=builder, encoding="utf-8", no_network=True, load_dtd=False)
        try:
            _feed(parser, _ENTITY.sub(_character, page), report)
            return builder.text()
        except etree.XMLSyntaxError:
            pass
    builder = TextBuilder(keep_navigation=keep_navigation)
    _feed(etree.HTMLParser(target=builder, encoding="utf-8", huge_tree=True), page, report)
    return builder.text()


def _feed(parser: object, page: str, report: Report | None) -> None:
    for start in range(0, len(page), _FEED_BYTES):
        parser.feed(page[start : start + _FEED_BYTES].encode("utf-8", "replace"))  # type: ignore[attr-defined]
        if report is not None:
            report.progress(start / len(page))
    parser.close()  # type: ignore[attr-defined]


def _character(match: re.Match[str]) -> str:
    """XHTML may name characters as its DTD does, which is not read."""
    name = match[1]
    return match[0] if name in _XML_ENTITIES else entities.html5.get(f"{name};", match[0])


def _recognizes(_: Source, head: bytes) -> bool:
    return _HTML.match(head.decode("latin-1")) is not None


FORMAT = Format("HTML", (".html", ".htm", ".xhtml"), read, _recognizes)
