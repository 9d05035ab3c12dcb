"""PDF, page by page through PDFium.

PDFium and not a pure-Python reader: it tells words apart by their distance on the page. TeX writes no space
characters, and pypdf 7.1 joins half of the words of the Debian policy manual ("thisisalinelikethis").
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import DocumentError
from .formats import Format
from .source import MAX_FILE_BYTES, MAX_TEXT_BYTES, Report, Source, too_large

if TYPE_CHECKING:
    import pypdfium2

_LOCK = threading.Lock()  # PDFium is not thread-safe, not even across documents
# PDFium joins a word that is broken at a line's end and leaves one of these marks for the hyphen.
_MARKS = "\x02\ufffe"
_BROKEN = re.compile(rf"(\w+)[{_MARKS}](\w+)")
_COMPOUND = re.compile(r"(\w+)-(?=(\w+))")
_ERROR_PASSWORD, _ERROR_SECURITY = 4, 5  # FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY
_OBJECT_IMAGE = 3  # FPDF_PAGEOBJ_IMAGE


def read(source: Source, report: Report) -> str:
    """The text of all pages, a blank line between two; pages without text but with pictures are told.

    Raises:
        DocumentError: damaged, encrypted, or without any text.
    """
    if source.size_bytes() > MAX_FILE_BYTES:
        raise too_large(source.name, MAX_FILE_BYTES)
    with _LOCK:
        document = _open(source)
        try:
            return _read_pages(document, report)
        finally:
            document.close()


def _open(source: Source) -> pypdfium2.PdfDocument:
    import pypdfium2

    try:
        return pypdfium2.PdfDocument(source.data if source.path is None else source.path)
    except pypdfium2.PdfiumError as error:
        if error.err_code in (_ERROR_PASSWORD, _ERROR_SECURITY):
            raise DocumentError(
                f"{source.name}: the PDF is encrypted; save a copy without its password (e.g. qpdf --decrypt)"
            ) from error
        raise DocumentError(
            f"{source.name}: not a PDF, or damaged or cut off; fetch it again or repair it (mutool clean)"
        ) from error


def _read_pages(document: pypdfium2.PdfDocument, report: Report) -> str:
    count = len(document)
    texts: list[str] = []
    pictures: list[int] = []
    damaged: list[int] = []
    chars = 0
    for index in range(count):
        text, has_picture = _read_page(document, index)
        if text is None:
            damaged.append(index + 1)
        elif text:
            texts.append(text)
            chars += len(text)
        elif has_picture:
            pictures.append(index + 1)
        if chars > MAX_TEXT_BYTES:
            raise too_large(report.name, MAX_TEXT_BYTES)
        report.progress((index + 1) / count)
    if not texts and damaged:
        raise DocumentError(f"{report.name}: damaged, none of its {count} pages can be read; fetch it again")
    if not texts:
        pages = "1 page" if count == 1 else f"{count} pages"
        raise DocumentError(
            f"{report.name}: has {pages} but no text: it looks scanned; run OCR first, e.g. ocrmypdf"
        )
    if pictures:
        report.notice(f"of {count} pages, {_pages(pictures)} a picture without text; run OCR (e.g. ocrmypdf)")
    if damaged:
        report.notice(f"of {count} pages, {_pages(damaged)} damaged and left out; fetch the file again")
    return _mend_hyphens("\n\n".join(texts))


def _read_page(document: pypdfium2.PdfDocument, index: int) -> tuple[str | None, bool]:
    """The text of a page (None: damaged), and for a page without text whether it shows a picture."""
    import pypdfium2

    try:
        page = document[index]
    except pypdfium2.PdfiumError:
        return None, False
    try:
        text_page = page.get_textpage()
        try:
            text: str = text_page.get_text_bounded()
        finally:
            text_page.close()
        text = text.replace("\r\n", "\n").replace("\xad", "").strip("\n ")
        return text, not text and any(True for _ in page.get_objects(filter=[_OBJECT_IMAGE]))
    except pypdfium2.PdfiumError:
        return None, False
    finally:
        page.close()


def _mend_hyphens(text: str) -> str:
    """Words broken at a line's end become whole; the hyphen stays where the document elsewhere writes it
    ("abort-upgrade"), for it may be part of a name."""
    if not any(mark in text for mark in _MARKS):
        return text
    compounds = {(match[1], match[2]) for match in _COMPOUND.finditer(text)}

    def mend(match: re.Match[str]) -> str:
        return f"{match[1]}-{match[2]}" if match.groups() in compounds else match[1] + match[2]

    return _BROKEN.sub(mend, text).translate(dict.fromkeys(map(ord, _MARKS), "-"))


def _pages(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"page {shown} is" if len(numbers) == 1 else f"pages {shown} are"


FORMAT = Format("PDF", (".pdf",), read, lambda _, head: head.startswith(b"%PDF-"))
