"""reStructuredText through docutils, with everything switched off that would read another file.

Directives and roles that plain docutils does not know (Sphinx has many) keep their source text: what is not
understood is shown, not dropped.
"""

from __future__ import annotations

import io
from typing import Any

from .encoding import decode
from .formats import Format
from .html import page_text
from .source import Report, Source

_SETTINGS: dict[str, Any] = {
    "file_insertion_enabled": False,  # include, csv-table :file:, ...
    "raw_enabled": False,
    "_disable_config": True,
    "report_level": 1,  # messages stay in the tree: they hold the source of what was not understood
    "halt_level": 5,
    "syntax_highlight": "none",
    "math_output": "LaTeX",
    "embed_stylesheet": False,
    "stylesheet_path": None,
    "stylesheet": None,
    "smart_quotes": False,
    "section_self_link": False,
    "doctitle_xform": True,
    "input_encoding": "unicode",
    "output_encoding": "unicode",
    "id_prefix": "",
    "line_length_limit": 1 << 20,
}


def read(source: Source, report: Report) -> str:
    """The rendered text; a source that docutils cannot parse at all is given as it is."""
    text = decode(source.read_all(), report)
    try:
        return _render(text)
    except (RecursionError, ValueError, AttributeError, KeyError, IndexError) as error:  # docutils' own bugs
        report.notice(f"is not valid reStructuredText ({type(error).__name__}); read as plain text")
        return text


def _render(text: str) -> str:
    from docutils import core, nodes

    settings = {**_SETTINGS, "warning_stream": io.StringIO()}
    tree = core.publish_doctree(text, settings_overrides=settings)
    for message in list(tree.findall(nodes.system_message)):
        sources = [child for child in message.children if isinstance(child, nodes.literal_block)]
        message.parent.replace(message, sources)
    for section in list(tree.findall(nodes.section)):
        if "system-messages" in section["classes"]:
            section.parent.remove(section)
    for picture in list(tree.findall(nodes.image)):  # an SVG file would be read for embedding
        picture.parent.replace(picture, nodes.Text(f" [{picture['alt']}] " if picture.get("alt") else ""))
    parts = core.publish_from_doctree(tree, writer="html5", settings_overrides=settings)
    page = parts if isinstance(parts, str) else parts.decode("utf-8")
    return page_text(page, keep_navigation=True)


FORMAT = Format("reStructuredText", (".rst", ".rest"), read)
