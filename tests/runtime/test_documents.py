"""Documents to text: one row per format, encodings, folders, and one hostile file per error."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from satchel.errors import DocumentError
from satchel.runtime import documents
from satchel.runtime.documents import archive, read_documents, source

# --- small documents, written byte by byte so that no writer library is needed ---


def make_pdf(*pages: str, picture: bool = False) -> bytes:
    """A PDF with one line of Helvetica per line of each page; ``picture`` puts a 1x1 image on every page."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"", b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    objects.append(
        b"<</Type/XObject/Subtype/Image/Width 1/Height 1/BitsPerComponent 8/ColorSpace/DeviceGray/Length 1>>"
        b"stream\n\x80\nendstream"
    )
    kids = []
    for page in pages:
        lines = "".join(f"({line}) Tj 0 -14 Td " for line in page.splitlines())
        drawn = " q 99 0 0 99 9 9 cm /P Do Q" if picture else ""
        content = f"BT /F1 12 Tf 72 720 Td {lines} ET{drawn}".encode()
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(content), content))
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents %d 0 R"
            b"/Resources<</Font<</F1 3 0 R>>/XObject<</P 4 0 R>>>>>>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<</Type/Pages/Kids[%s]/Count %d>>" % (b" ".join(kids), len(kids))
    return assemble_pdf(objects)


def assemble_pdf(objects: list[bytes], trailer: bytes = b"") -> bytes:
    out = bytearray(b"%PDF-1.4\n")
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    out += b"trailer<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, start)
    return bytes(out)


def make_encrypted_pdf() -> bytes:
    """A PDF whose password hashes match no password."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[]/Count 0>>"]
    objects.append(b"<</Filter/Standard/V 1/R 2/O<%s>/U<%s>/P -4>>" % (b"11" * 32, b"22" * 32))
    return assemble_pdf(objects, b"/Encrypt 3 0 R/ID[<00><00>]")


def make_zip(members: dict[str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return out.getvalue()


def make_epub(chapters: dict[str, str], **extra: str) -> bytes:
    """An EPUB with its chapters in the given order; ``extra`` members replace the usual ones."""
    manifest = "".join(
        f'<item id="c{i}" href="{name}" media-type="application/xhtml+xml"/>'
        for i, name in enumerate(chapters)
    )
    spine = "".join(f'<itemref idref="c{i}"/>' for i in range(len(chapters)))
    members: dict[str, str | bytes] = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container">'
        '<rootfiles><rootfile full-path="OEBPS/content.opf"/></rootfiles></container>',
        "OEBPS/content.opf": '<package xmlns="http://www.idpf.org/2007/opf">'
        f"<manifest>{manifest}</manifest><spine>{spine}</spine></package>",
    }
    for name, body in chapters.items():
        members[f"OEBPS/{name.replace('%20', ' ')}"] = (
            f'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head><body>{body}</body></html>'
        )
    return make_zip(members | extra)


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def make_docx(body: str, **extra: str) -> bytes:
    styles = '<w:style w:styleId="H1"><w:name w:val="heading 1"/></w:style>'
    return make_zip(
        {
            "word/document.xml": f"<w:document {W}><w:body>{body}</w:body></w:document>",
            "word/styles.xml": f"<w:styles {W}>{styles}</w:styles>",
            **{f"word/{name}.xml": text for name, text in extra.items()},
        }
    )


def run(text: str) -> str:
    return f"<w:r><w:t>{text}</w:t></w:r>"


HTML_PAGE = (
    "<!doctype html><head><title>T</title><style>p{}</style></head><body><nav>Home Login</nav><h1>Guide</h1>"
    "<p>The satchel&nbsp;holds &lt;42&gt; pages<script>var x = 'no';</script>.<ul><li>one<li>two</ul></body>"
)
DOCX_BODY = (
    f'<w:p><w:pPr><w:pStyle w:val="H1"/></w:pPr>{run("Guide")}</w:p>'
    f"<w:p>{run('The satchel holds 42 pages.')}</w:p>"
)


def read_bytes(folder: Path, name: str, data: bytes) -> documents.Document:
    path = folder / name
    path.write_bytes(data)
    return read_documents([path])


# --- formats ---


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"Guide\r\n\r\nThe satchel.\r\n", "Guide\n\nThe satchel.\n"),
        ("a.md", b"# Guide\n\n* one\n", "# Guide\n\n* one\n"),
        ("a.py", b"def f():\n    return 42\n", "def f():\n    return 42\n"),
        ("Makefile", b"all:\n\techo\n", "all:\n\techo\n"),
        ("a.html", HTML_PAGE.encode(), "# Guide\n\nThe satchel holds <42> pages.\n\n- one\n- two"),
        ("a.unknown", HTML_PAGE.encode(), "# Guide\n\nThe satchel holds <42> pages.\n\n- one\n- two"),
        ("a.pdf", make_pdf("Guide\nThe satchel.", "Page two"), "Guide\nThe satchel.\n\nPage two"),
        ("pdf_without_name", make_pdf("Guide"), "Guide"),
        (
            "a.epub",
            make_epub({"b%20b.xhtml": "<h1>Guide</h1>", "a.xhtml": "<p>x<br/>y&nbsp;z</p>"}),
            "# Guide\n\nx\ny z",
        ),
        ("a.docx", make_docx(DOCX_BODY), "# Guide\n\nThe satchel holds 42 pages."),
        ("docx_without_name", make_docx(DOCX_BODY), "# Guide\n\nThe satchel holds 42 pages."),
        (
            "a.rst",
            b"Guide\n=====\n\nThe *satchel*.\n\n* one\n* two\n",
            "# Guide\n\nThe satchel.\n\n- one\n- two",
        ),
    ],
)
def test_each_format(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    document = read_bytes(tmp_path, name, data)
    assert document.text == expected
    assert document.notices == ()
    assert document.parts == [(str(tmp_path / name), expected)]


def test_every_format_of_the_registry_has_a_row() -> None:
    assert [form.name for form in documents.FORMATS] == [
        "PDF",
        "EPUB",
        "DOCX",
        "HTML",
        "reStructuredText",
        "plain text",
    ]
    extensions = [extension for form in documents.FORMATS for extension in form.extensions]
    assert len(extensions) == len(set(extensions))


# --- HTML ---


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("<p>a\n b<br>c</p><p>d", "a b\nc\n\nd"),
        ("<pre>if x:\n    y</pre>", "if x:\n    y"),
        ("<ol start=3><li>x<ul><li>y</ul><li>z</ol>", "3. x\n   - y\n4. z"),
        ("<ol start=-9><li value=99999999999999>x</ol>", "1. x"),
        (
            "<table><tr><th>a<th>b<tr><td>1<td><p>2</p><p>3</p></table>",
            "| a | b |\n| --- | --- |\n| 1 | 2 3 |",
        ),
        ("<table><tr><td><h1>Layout</h1><td><pre>x\n  y</pre></table>", "# Layout\n\nx\n  y"),
        ("<table><tr><td>a<td>b", "| a | b |"),
        ("<dl><dt>term<dd>meaning</dl>", "term\n\n    meaning"),
        ("<p>so&shy;ft &eacute; &#8364; &amp;lt;", "soft é € &lt;"),
        ("<title>Only title</title><p>x", "# Only title\n\nx"),
        ("<h1>A<a class=headerlink>#</a></h1><div role=navigation>menu</div>b<p hidden>c</p>", "# A\n\nb"),
        ("<nav>Only <a>links</a></nav>", "Only links"),
        ('<?xml version="1.0"?><html><script src="x"/><p>after&hellip;</p></html>', "after…"),
        ('<?xml version="1.0"?><html><p>broken <b>XHTML</p> stays', "broken XHTML\n\nstays"),
        ("</td></li></pre></table>x</ul></blockquote><td>y", "x\n\ny"),
        ("<img alt='A map' src=x>", "[A map]"),
    ],
)
def test_html_structure(tmp_path: Path, markup: str, expected: str) -> None:
    assert read_bytes(tmp_path, "a.html", markup.encode()).text == expected


def test_deep_html_loses_nothing(tmp_path: Path) -> None:
    data = b"<div>" * 50_000 + b"deep" + b"</div>" * 50_000 + b"<p>end"
    assert read_bytes(tmp_path, "a.html", data).text == "deep\n\nend"


def test_text_across_feeds_is_whole(tmp_path: Path) -> None:
    words = [f"wörd{i}&amp;" for i in range(40_000)]  # longer than one feed of the parser, so cut anywhere
    text = read_bytes(tmp_path, "a.html", " ".join(words).encode()).text
    assert text.split() == [word.replace("&amp;", "&") for word in words]


# --- DOCX, EPUB, PDF, reStructuredText ---


def test_docx_keeps_what_others_drop(tmp_path: Path) -> None:
    item = (
        '<w:p><w:pPr><w:numPr><w:ilvl w:val="{}"/><w:numId w:val="7"/></w:numPr></w:pPr>'
        + run("{}")
        + "</w:p>"
    )
    body = (
        f"<w:p>{run('old ')}<w:ins>{run('inserted')}</w:ins>"
        f"<w:del><w:r><w:delText>x</w:delText></w:r>{run('gone')}"
        '</w:del><w:r><w:footnoteReference w:id="2"/></w:r></w:p>'
        f"<w:sdt><w:sdtContent><w:p>{run('control')}</w:p></w:sdtContent></w:sdt>"
        + item.format(0, "first")
        + item.format(1, "inner")
        + item.format(0, "second")
        + f"<w:tbl><w:tr><w:tc><w:p>{run('a')}</w:p></w:tc><w:tc><w:p>{run('b')}</w:p></w:tc></w:tr></w:tbl>"
    )
    level = '<w:lvl w:ilvl="{}"><w:numFmt w:val="{}"/></w:lvl>'
    levels = level.format(0, "decimal") + level.format(1, "bullet")
    numbering = (
        f'<w:numbering {W}><w:abstractNum w:abstractNumId="4">{levels}</w:abstractNum>'
        '<w:num w:numId="7"><w:abstractNumId w:val="4"/></w:num></w:numbering>'
    )
    footnotes = f'<w:footnotes {W}><w:footnote w:id="2"><w:p>{run("a note")}</w:p></w:footnote></w:footnotes>'
    document = read_bytes(tmp_path, "a.docx", make_docx(body, numbering=numbering, footnotes=footnotes))
    assert document.text == (
        "old inserted[2]\n\ncontrol\n\n1. first\n    - inner\n2. second\n\n"
        "| a | b |\n\n## Footnotes\n\n[2] a note"
    )


def test_epub_follows_the_spine_and_tells_a_missing_chapter(tmp_path: Path) -> None:
    data = make_epub({"z.xhtml": "<p>first</p>", "a.xhtml": "<p>second</p>"})
    assert read_bytes(tmp_path, "a.epub", data).text == "first\n\nsecond"
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members: dict[str, str | bytes] = {n: file.read(n) for n in file.namelist() if n != "OEBPS/z.xhtml"}
    document = read_bytes(tmp_path, "b.epub", make_zip(members))
    assert document.text == "second"
    assert "'OEBPS/z.xhtml' is listed but missing" in document.notices[0]


def test_pdf_tells_pages_that_are_pictures(tmp_path: Path) -> None:
    document = read_bytes(tmp_path, "a.pdf", make_pdf("text", "", "more", picture=True))
    assert document.text == "text\n\nmore"
    assert re.search(r"of 3 pages, page 2 is a picture without text; run OCR", document.notices[0])


def test_pdf_progress_goes_page_by_page(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(make_pdf("one", "two", "three", "four"))
    seen: list[float] = []
    read_documents([path], progress=lambda _, fraction: seen.append(fraction))
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_pdf_hyphens_are_mended_by_the_document_itself() -> None:
    mend = documents.pdf._mend_hyphens
    assert mend("a dis\ufffetribution, abort\x02upgrade or abort-upgrade, end\x02") == (
        "a distribution, abort-upgrade or abort-upgrade, end-"
    )


def test_rst_reads_no_other_file_and_drops_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("TOP SECRET")
    text = read_bytes(
        tmp_path,
        "a.rst",
        f".. include:: {secret}\n\n.. raw:: html\n   :file: {secret}\n\n"
        f".. csv-table::\n   :file: {secret}\n\n"
        f".. image:: {secret}\n   :alt: A picture\n   :loading: embed\n\n"
        ".. versionadded:: 3.2\n   New thing.\n\nSee :ref:`there <x>`.\n\n"
        ".. code-block:: python\n\n   if x:\n       y\n\n"
        "=====  =====\nname   value\n=====  =====\na      1\n=====  =====\n".encode(),
    ).text
    assert "TOP SECRET" not in text
    for kept in (
        "include::",
        "versionadded:: 3.2",
        "New thing.",
        ":ref:`there <x>`",
        "if x:\n    y",
        "| a | 1 |",
    ):
        assert kept in text
    assert "[A picture]" in text


# --- encodings ---

SENTENCE = "Größe, naïveté, Ελλάδα, Київ, 日本語 🎒\n"
FRENCH = "Où est la bibliothèque de l'université ? Très près de l'hôtel, à côté du café où il a mangé.\n" * 5


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le-bom", "utf-16-be-bom"]
)
def test_unicode_encodings(tmp_path: Path, encoding: str) -> None:
    data = SENTENCE.encode(encoding.removesuffix("-bom"))
    if encoding.endswith("-bom"):
        data = "\ufeff".encode(encoding.removesuffix("-bom")) + data
    document = read_bytes(tmp_path, "a.txt", data)
    assert document.text == SENTENCE
    assert document.notices == ()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_mark(tmp_path: Path, encoding: str) -> None:
    assert read_bytes(tmp_path, "a.txt", FRENCH.encode(encoding)).text == FRENCH


def test_guessed_encoding_is_told(tmp_path: Path) -> None:
    document = read_bytes(tmp_path, "a.txt", FRENCH.encode("latin-1"))
    assert document.text == FRENCH
    assert "is not UTF-8; read as" in document.notices[0]


def test_declared_encoding_of_html(tmp_path: Path) -> None:
    page = "<meta charset='koi8-r'><p>Привет, мир"
    document = read_bytes(tmp_path, "a.html", page.encode("koi8-r"))
    assert document.text == "Привет, мир"
    assert document.notices == ()


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    document = read_bytes(tmp_path, "a.txt", ("é" * 100).encode() + b"\xff end")
    assert document.text == "é" * 100 + "\ufffd end"
    assert "1 damaged characters (not UTF-8)" in document.notices[0]


def test_odd_utf16_is_told(tmp_path: Path) -> None:
    document = read_bytes(tmp_path, "a.txt", "ab".encode("utf-16") + b"c")
    assert document.text == "ab\ufffd"
    assert "UTF-16" in document.notices[0]


# --- several sources, folders, standard input ---


def test_several_files_are_headed_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("alpha")
    Path("b.md").write_text("beta")
    document = read_documents(["b.md", Path("a.txt")])
    assert document.text == "===== b.md =====\n\nbeta\n\n===== a.txt =====\n\nalpha"
    assert document.parts == [("b.md", "beta"), ("a.txt", "alpha")]


def test_folder(tmp_path: Path) -> None:
    root = tmp_path / "project"
    for name, data in {
        "z.txt": b"zed", "a/b.py": b"x = 1", "a/empty.py": b"", ".git/config": b"no", ".hidden": b"no",
        "node_modules/x.js": b"no", "env/pyvenv.cfg": b"no", "logo.png": b"\x89PNG\r\n",
        "bad.pdf": b"%PDF-1.4 junk", "data.bin": bytes(range(256)), "uv.lock": b"no",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (tmp_path / "outside.txt").write_text("outside")
    (root / "link.txt").symlink_to(tmp_path / "outside.txt")
    (root / "loop").symlink_to(root)
    document = read_documents([root])
    assert document.parts == [("project/z.txt", "zed"), ("project/a/b.py", "x = 1")]
    notices = "\n".join(document.notices)
    for told in ("node_modules/ (generated)", "env/ (generated)", "logo.png (binary)", "data.bin (binary)",
                 "link.txt (a link)", "loop (a link)", "uv.lock (generated)",
                 "skipped project/bad.pdf: not a PDF"):  # fmt: skip
        assert told in notices


class _Stdin:
    def __init__(self, data: bytes, terminal: bool = False) -> None:
        self.buffer = io.BytesIO(data)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    "data", [b"piped", make_pdf("piped"), b"<html><p>piped", make_epub({"a.xhtml": "piped"})]
)
def test_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", _Stdin(data))
    assert read_documents(["-"]).parts == [("standard input", "piped")]


def test_standard_input_twice_or_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", _Stdin(b"", terminal=True))
    with pytest.raises(DocumentError, match="is a terminal here"):
        read_documents(["-"])
    with pytest.raises(DocumentError, match="more than once"):
        read_documents(["-", "-"])


# --- hostile and broken files ---

ENTITY_BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9)
)
CONTAINER = "META-INF/container.xml"
LOCKED = (
    '<encryption><EncryptionMethod Algorithm="http://www.w3.org/2001/04/xmlenc#aes256-cbc"/></encryption>'
)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"is empty \(0 bytes\)"),
        ("a.txt", b" \n\t", "has no text, only white space"),
        ("a.txt", b"ab\0cd" * 99, "is a binary file"),
        ("a.txt", bytes(range(1, 32)) * 9, "is a binary file"),
        ("a.txt", make_pdf("x"), "a PDF under another name"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0), "gzip-compressed; unpack it first"),
        ("a.doc", b"\xd0\xcf\x11\xe0" + bytes(99), "an old Office file; save it as .docx"),
        ("a.rtf", rb"{\rtf1 text}", "is RTF"),
        ("a.odt", make_zip({"mimetype": "x"}), "a ZIP archive, but not EPUB or DOCX"),
        ("a.html", b"<script>only()</script>", "markup but no text"),
        ("a.pdf", b"<html>not found", "not a PDF, or damaged"),
        ("a.pdf", make_pdf("x")[:200], "not a PDF, or damaged"),
        ("a.pdf", make_pdf("", "", picture=True), "has 2 pages but no text: it looks scanned; run OCR first"),
        ("a.pdf", make_pdf("", picture=True), "has 1 page but no text"),
        ("a.pdf", make_encrypted_pdf(), "the PDF is encrypted"),
        ("a.epub", b"junk", "not EPUB, or damaged"),
        ("a.epub", make_epub({"a.xhtml": "x"})[:-40], "not EPUB, or damaged"),
        ("a.epub", make_epub({}), "its spine names no chapters"),
        ("a.epub", make_zip({"x": "y"}), "'META-INF/container.xml' is missing"),
        ("a.epub", make_epub({"a.xhtml": "x"}, **{CONTAINER: "<a>"}), "is not well-formed"),
        ("a.epub", make_epub({"a.xhtml": "x"}, **{CONTAINER: ENTITY_BOMB + "]><x>&j;</x>"}), "declares XML"),
        ("a.epub", make_epub({"a.xhtml": "<img src='p'/>"}), "has 1 chapters but no text"),
        ("a.epub", make_epub({"a.xhtml": "x"}, **{"META-INF/encryption.xml": LOCKED}), "locked by DRM"),
        ("a.docx", b"PK\x03\x04junk", "not DOCX, or damaged"),
        ("a.docx", make_zip({"x": "y"}), "'word/document.xml' is missing"),
        ("a.docx", make_docx("<w:p>"), "is not well-formed"),
        ("a.docx", make_docx("<w:p/>"), "the DOCX has no text"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as caught:
        read_bytes(tmp_path, name, data)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_epub_chapter_with_entity_bomb_does_not_grow(tmp_path: Path) -> None:
    data = make_epub(
        {"a.xhtml": "x"}, **{"OEBPS/a.xhtml": '<?xml version="1.0"?>' + ENTITY_BOMB + "]><p>ok &j;</p>"}
    )
    assert len(read_bytes(tmp_path, "a.epub", data).text) < 10_000


@pytest.mark.parametrize("name", ["a.epub", "a.docx"])
def test_zip_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1 << 20)
    huge = "<w:p>" + " " * (2 << 20)
    data = make_docx(huge) if name == "a.docx" else make_epub({"a.xhtml": huge})
    assert len(data) < 20_000
    with pytest.raises(DocumentError, match="unpacks to more than 1 MiB of text"):
        read_bytes(tmp_path, name, data)


def test_encrypted_zip(tmp_path: Path) -> None:
    data = bytearray(make_docx(DOCX_BODY))
    position = data.index(b"PK\x01\x02")  # the central directory decides
    while position >= 0:
        data[position + 8] |= 1
        position = data.find(b"PK\x01\x02", position + 1)
    with pytest.raises(DocumentError, match="the DOCX file is encrypted"):
        read_bytes(tmp_path, "a.docx", bytes(data))


@pytest.mark.parametrize(
    "make", [make_pdf, lambda text: make_epub({"a.xhtml": text}), lambda t: make_docx(run(t))]
)
def test_any_damage_is_a_document_error_or_text(tmp_path: Path, make: Callable[[str], bytes]) -> None:
    """Cut anywhere, or with any byte flipped: a clear error or some text, never another exception."""
    whole = make("The satchel")
    name = {b"%": "a.pdf", b"P": "a.epub"}[whole[:1]]
    if b"word/document.xml" in whole:
        name = "a.docx"
    damaged = [whole[:length] for length in range(1, len(whole), 41)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(0, len(whole), 23)]
    read = 0
    for data in damaged:
        with contextlib.suppress(DocumentError):
            read += bool(read_bytes(tmp_path, name, data).text)
    assert read < len(damaged)


def test_missing_and_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DocumentError, match="no such file or folder"):
        read_documents([tmp_path / "missing.txt"])
    with pytest.raises(DocumentError, match="not a path"):
        read_documents(["a\0b"])
    with pytest.raises(DocumentError, match="no document given"):
        read_documents([])
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no mode stops
    with pytest.raises(DocumentError, match="permission denied; allow your user to read it"):
        read_documents([tmp_path / "a.txt"])


def test_folder_without_documents(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DocumentError, match="no readable documents in this folder"):
        read_documents([tmp_path])


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = source.MIB
    monkeypatch.setattr(documents, "MAX_TEXT_BYTES", limit)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x" * (limit * 3 // 4))
    with pytest.raises(DocumentError, match="the documents together: larger than the limit of 1 MiB"):
        read_documents([tmp_path / "a.txt", tmp_path / "b.txt"])
    with pytest.raises(DocumentError, match="larger than the limit of 524288 bytes; split it"):
        source.Source("a", tmp_path / "a.txt").read_all(limit // 2)
    with pytest.raises(DocumentError, match="larger than the limit of 1 MiB; split it"):
        source.Source("pipe", data=b"x" * (limit + 1)).read_all(limit)


# --- the real manual in four formats ---


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


@pytest.mark.real
@pytest.mark.parametrize("name", ["policy.html", "policy.pdf", "policy.epub"])
def test_real_formats_agree(real_document: Callable[[str], Path], name: str) -> None:
    expected = _words(read_documents([real_document("policy.txt")]).text)
    document = read_documents([real_document(name)])
    found = sum((expected & _words(document.text)).values()) / expected.total()
    assert found > 0.99
    assert "if [ upgrade !=" in document.text  # a code block came through
