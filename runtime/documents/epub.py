"""EPUB 2 and 3: the chapters in the order of the package's spine."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from urllib.parse import unquote

from ...errors import DocumentError
from .archive import Archive, holds
from .encoding import decode
from .formats import Format
from .html import page_text
from .source import MAX_TEXT_BYTES, Report, Source, too_large

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_CHAPTER_TYPES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")
# Obfuscated fonts are common and harmless; any other algorithm means that the text is locked.
_FONT_ALGORITHMS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")


class _Elements:
    """A parser's target that keeps the elements of some names with their attributes, in order."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self.found: list[tuple[str, dict[str, str]]] = []

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        name = tag.rpartition("}")[2]
        if name in self._names:
            self.found.append((name, dict(attributes)))

    def close(self) -> None:
        """Nothing to do; lxml asks for it."""


def read(source: Source, report: Report) -> str:
    """The text of all chapters in reading order, a blank line between two.

    Raises:
        DocumentError: damaged, locked, or without text.
    """
    with Archive(source, "EPUB") as archive:
        _refuse_locked(archive, source.name)
        chapters = _spine(archive)
        texts: list[str] = []
        chars = 0
        for done, member in enumerate(chapters, start=1):
            if member not in archive:
                report.notice(f"the chapter {member!r} is listed but missing")
                continue
            text = page_text(decode(archive.read(member), report))
            chars += len(text)
            if chars > MAX_TEXT_BYTES:
                raise too_large(source.name, MAX_TEXT_BYTES)
            if text:
                texts.append(text)
            report.progress(done / len(chapters))
    if not texts:
        raise DocumentError(
            f"{source.name}: has {len(chapters)} chapters but no text: they may be pictures; run OCR first"
        )
    return "\n\n".join(texts)


def _refuse_locked(archive: Archive, name: str) -> None:
    if _ENCRYPTION not in archive:
        return
    methods = _Elements("EncryptionMethod")
    archive.parse(_ENCRYPTION, methods)
    if any(attributes.get("Algorithm") not in _FONT_ALGORITHMS for _, attributes in methods.found):
        raise DocumentError(f"{name}: the EPUB is locked by DRM; Satchel reads only unprotected books")


def _spine(archive: Archive) -> list[str]:
    """Archive members of the chapters in reading order."""
    roots = _Elements("rootfile")
    archive.parse(_CONTAINER, roots)
    package = next((attributes.get("full-path", "") for _, attributes in roots.found), "")
    elements = _Elements("item", "itemref")
    archive.parse(package, elements)
    items = {attributes.get("id"): attributes for name, attributes in elements.found if name == "item"}
    folder = posixpath.dirname(package)
    chapters: list[str] = []
    for name, reference in elements.found:
        item = items.get(reference.get("idref")) if name == "itemref" else None
        if item is not None and item.get("media-type") in _CHAPTER_TYPES:
            href = unquote(item.get("href", "").partition("#")[0])
            chapters.append(posixpath.normpath(posixpath.join(folder, href)))
    if not chapters:
        raise archive.damaged("its spine names no chapters")
    return chapters


FORMAT = Format("EPUB", (".epub",), read, lambda source, head: holds(source, head, _CONTAINER))
