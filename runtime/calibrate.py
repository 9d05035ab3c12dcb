"""`calibrate`: a model's package and a person's text, in the model's tokens and chat form, for `export/calibration`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..devices.machine import cores_usable
from ..devices.reporting import Notice, Progress, log_notice
from ..errors import DocumentError, OptionError
from ..export.calibration.decoder import require_torch
from ..export.calibration.methods import METHODS
from ..export.calibration.text import Order, Passkeys, Text
from ..export.package import Package
from ..export.resolve import resolve_model
from .chat_template import ChatTemplate
from .documents import read_documents
from .tokenizer import Tokenizer

DEFAULT_METHOD = "kvzap"
REQUEST = "Repeat the previous context exactly."
QUESTION = "What are the passkeys of the vaults?"
VAULTS = ("red", "green", "blue", "black", "white", "yellow", "brown", "grey", "orange", "silver", "golden", "purple")
WORDS = (
    "alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima", "mike",
    "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee",
    "zulu", *"0123456789",
)  # fmt: skip


def calibrate(
    model: str | Path,
    documents: Sequence[str | Path],
    *,
    method: str = DEFAULT_METHOD,
    order: Order | None = None,
    threads: int | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    notice: Notice = log_notice,
) -> dict[str, Any]:
    """Measures ``model`` on the text of ``documents``, writes the result into its package, and returns the figures.

    Args:
        model: as `load` takes it; fetched and exported first where that is needed.
        documents: files or folders, as `Model.read` takes them.
        order: windows, tokens, target and seed; None: the defaults.
        progress: called with the stage ``calibrating`` and tokens.

    Raises:
        OptionError: the method is not known, torch is not installed, or the text is too short.
        DocumentError: a document cannot be read as text.
        ModelError, DownloadError, StorageError: the model cannot be had, used or written to.
    """
    if method not in METHODS:
        raise OptionError(f"calibration method {method!r} is not known; choose one of {', '.join(METHODS)}")
    require_torch()
    read = read_documents(list(documents))
    for line in read.notices:
        notice(line)
    if not read.text.strip():
        raise DocumentError("the documents have only white space; nothing to calibrate on")
    package = resolve_model(model, cache_dir=cache_dir, progress=progress, notice=notice)
    record = METHODS[method].calibrate(
        package, text_of(package, read.text), order or Order(), threads=threads or cores_usable(), progress=progress
    )
    return {"model": str(model), "method": method, "package_folder": str(package.folder), **record}


def text_of(package: Package, text: str) -> Text:
    """``text`` and passkeys in the package's tokens, and what its chat template has before a document and after it."""
    tokenizer = Tokenizer.open(package.folder, package.manifest.tokenizer)
    settings = package.manifest.tokenizer

    def spelling(token: int | None) -> str:
        return "" if token is None else tokenizer.decode([token], special=True)

    template = ChatTemplate(
        settings.chat_template, bos_token=spelling(settings.bos_id), eos_token=spelling(settings.eos_id)
    )
    before = tokenizer.encode_segments(template.prefix(None, None))

    def asked(question: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode_segments(template.rest(question), start=False))

    def inside(piece: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode_segments([(piece, False)], start=False))

    passkeys = Passkeys(
        cues=tuple(inside(f"\nThe passkey of the {vault} vault is:") for vault in VAULTS),
        words=tuple(inside(f" {word}") for word in WORDS),
        end=inside(".\n"),
        question=asked(QUESTION),
    )
    return Text(tuple(tokenizer.encode(text)), tuple(before), asked(REQUEST), passkeys)
