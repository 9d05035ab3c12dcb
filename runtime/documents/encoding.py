"""Bytes to text: byte order marks, then UTF-8, then what the document declares, then a guess that is told.

A wrong guess is worse than an error, because the model would answer from garbage: every guess leaves a
notice, and bytes that are no text are refused.
"""

from __future__ import annotations

import codecs
import re

from ...errors import DocumentError
from .source import Report

# UTF-32 first: its little-endian mark starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_GUESS_BYTES = 1 << 16  # the guesser is slow on megabytes and gains nothing from them
_CONTROLS = re.compile(r"[\x00-\x06\x0e-\x1a\x7f]")  # not tab, newlines, form feed, escape: text has those
_KNOWN_BINARIES = (
    (b"%PDF-", "a PDF under another name; rename it to .pdf"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first (gunzip)"),
    (b"BZh", "bzip2-compressed; unpack it first (bunzip2)"),
    (b"\xfd7zXZ", "xz-compressed; unpack it first (unxz)"),
    (b"(\xb5/\xfd", "zstd-compressed; unpack it first (unzstd)"),
    (b"PK\x03\x04", "a ZIP archive, but not EPUB or DOCX; unpack it, or save it as .docx or .pdf"),
    (b"\xd0\xcf\x11\xe0", "an old Office file; save it as .docx or .pdf"),
    (b"{\\rtf", "RTF; save it as .docx, .pdf or plain text"),
    (b"\x89PNG", "a picture; run OCR first (for example tesseract)"),
    (b"\xff\xd8\xff", "a picture; run OCR first (for example tesseract)"),
    (b"GIF8", "a picture; run OCR first (for example tesseract)"),
    (b"GGUF", "a model, not a document; give it with --model"),
)


def decode(data: bytes, report: Report, declared: str | None = None) -> str:
    """The text of ``data``, with newlines as ``\\n`` and without a byte order mark.

    Args:
        declared: the encoding that the document itself names, used when the bytes are not UTF-8.

    Raises:
        DocumentError: the bytes are no text, or in no encoding that can be told.
    """
    text = _decode(data, report, declared)
    if "\0" in text or len(_CONTROLS.findall(text, 0, _GUESS_BYTES)) * 20 > min(len(text), _GUESS_BYTES):
        raise binary(report.name, data)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def looks_binary(head: bytes) -> bool:
    """Whether the first bytes of a file are certainly no text."""
    if head.startswith(tuple(magic for magic, _ in _KNOWN_BINARIES)):
        return True
    marked = head.startswith(tuple(mark for mark, _ in _MARKS))
    return b"\0" in head and not marked and _utf16_without_mark(head) is None


def binary(name: str, data: bytes) -> DocumentError:
    """The error for bytes that are no text, naming what they are where that is known."""
    for magic, what in _KNOWN_BINARIES:
        if data.startswith(magic):
            return DocumentError(f"{name}: is {what}")
    return DocumentError(f"{name}: is a binary file, not text; save it as text, PDF, EPUB, DOCX or HTML")


def _decode(data: bytes, report: Report, declared: str | None) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _decode_marked(data, len(mark), encoding, report)
    if looks_binary(data[:8192]):
        raise binary(report.name, data)
    try:
        if (wide := _utf16_without_mark(data[:8192])) is not None:
            return data.decode(wide)
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    if declared is not None:
        try:
            return data.decode(declared)
        except (LookupError, UnicodeDecodeError):
            report.notice(f"declares the encoding {declared[:40]!r}, which does not fit its bytes")
    return _mostly_utf8(data, report) or _guess(data, report)


def _decode_marked(data: bytes, mark_bytes: int, encoding: str, report: Report) -> str:
    body = memoryview(data)[mark_bytes:]
    try:
        return str(body, encoding)
    except UnicodeDecodeError as error:
        where = error.start + mark_bytes
        report.notice(f"byte {where} is not {encoding.upper()}; damaged characters are shown as �")
        return str(body, encoding, "replace")


def _utf16_without_mark(head: bytes) -> str | None:
    """UTF-16 of mostly Latin text has a zero in every other byte, and none in the others."""
    pairs = len(head) // 2
    if pairs < 4:
        return None
    even, odd = head[0 : 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    if odd > 0.4 * pairs and even == 0:
        return "utf-16-le"
    if even > 0.4 * pairs and odd == 0:
        return "utf-16-be"
    return None


def _mostly_utf8(data: bytes, report: Report) -> str | None:
    """UTF-8 with a few damaged bytes: far more characters beyond ASCII decode than fail, not by chance."""
    text = data.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    beyond_ascii = sum(len(run) for run in re.findall(r"[^\x00-\x7f\ufffd]+", text))
    if damaged * 20 > beyond_ascii:
        return None
    report.notice(f"{damaged} damaged characters (not UTF-8) are shown as �")
    return text


def _guess(data: bytes, report: Report) -> str:
    """What charset-normalizer finds most likely from a sample around the first byte beyond ASCII."""
    from charset_normalizer import from_bytes

    first = next((m.start() for m in re.finditer(rb"[\x80-\xff]", data)), 0)
    start = max(0, first - _GUESS_BYTES // 2)
    matches = list(from_bytes(data[start : start + _GUESS_BYTES]))
    if matches:  # of equally likely ones it names the first by alphabet; cp1252 is by far the most common
        best = (matches[0].chaos, matches[0].coherence)
        matches.sort(key=lambda match: match.encoding != "cp1252" or (match.chaos, match.coherence) != best)
    for encoding in dict.fromkeys([*(match.encoding for match in matches), "cp1252"]):
        try:
            text = data.decode(encoding)
        except (LookupError, UnicodeDecodeError):
            continue
        report.notice(
            f"is not UTF-8; read as {encoding}, a guess; if characters look wrong, convert it to UTF-8"
        )
        return text
    raise binary(report.name, data)
