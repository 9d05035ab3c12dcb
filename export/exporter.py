"""From a model file to a package folder: as a command, and by itself when a model is first used.

A package appears whole or not at all: it is written into a temporary folder beside its place and renamed at
the end.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from ..devices.files.cache_folder import package_folder, packages_folder
from ..devices.files.file_lock import file_lock
from ..devices.files.safe_write import make_folder, storage_errors, temporary_file, temporary_folder
from ..devices.reporting import Notice, Progress, log_notice, no_progress
from ..errors import ModelError, OptionError, StorageError
from .architectures import DecoderModel, read_model
from .linked import LinkedFlavour, kv_settings, link_to
from .native import NativeFlavour
from .package import (
    EXPORTER_VERSION,
    LINKED,
    LINKED_FILES,
    MANIFEST_FILE,
    REQUIRED_FILES,
    TOKENIZER_FILE,
    Manifest,
    Package,
    is_package,
    open_package,
    record_files,
    write_manifest,
)
from .portable import PortableFlavour
from .ready_tokenizer import ready_tokenizer
from .sources import Source, open_source
from .tokenizer import TokenizerSettings, build_tokenizer
from .weights import MatrixRecord

BITS = (4, 8)
TOKENIZER_BYTES = 64 << 20  # allowance for tokenizer.json and manifest in the check of free space
FINGERPRINTS_FILE = "fingerprints.json"


class Flavour(Protocol):
    """What a flavour does; made with (model, source, bits)."""

    model: DecoderModel

    @property
    def bytes_needed(self) -> int: ...

    def write(self, folder: Path, progress: Progress) -> list[MatrixRecord]: ...


FLAVOURS: dict[str, Callable[[DecoderModel, Source, int], Flavour]] = {
    "native": NativeFlavour,
    "portable": PortableFlavour,
}
UNLISTED = {LINKED: LinkedFlavour}  # made by `ensure_package` only: it is of no use in another place


def export_model(
    source: Path, out: Path, *, bits: int = 8, flavour: str = "native", progress: Progress | None = None
) -> Package:
    """Exports a model into the package folder ``out``, replacing an older package there.

    Args:
        source: a .gguf file (of a split one the first part) or a Hugging Face folder.
        bits: 8 keeps every code of the file; 4 rounds the layers' matrices to 4 bits.
        progress: called with the stages ``checking`` and ``exporting``, in bytes.

    Raises:
        ModelError: the source cannot be used.
        OptionError: ``bits`` or ``flavour`` is not known.
        StorageError: ``out`` is something else than a package, or the disk cannot take it.
    """
    _check_options(bits, flavour)
    if out.exists() and not is_package(out) and not (out.is_dir() and not any(out.iterdir())):
        raise StorageError(f"{out} exists and is not a model package; name another folder or remove it")
    if out.is_dir() and (others := {path.name for path in out.iterdir()} - {MANIFEST_FILE, *REQUIRED_FILES}):
        raise StorageError(
            f"{out} is a package, but also holds {min(others)}; move that away or name another folder"
        )
    with open_source(source) as opened:
        return _export(opened, None, out.absolute(), bits, flavour, progress or no_progress)


def ensure_package(
    source: Path,
    cache_dir: Path,
    progress: Progress | None = None,
    *,
    bits: int = 8,
    flavour: str = "native",
    notice: Notice = log_notice,
) -> Package:
    """The package of ``source`` in the cache folder: found there by content, or exported now.

    Raises:
        ModelError, OptionError, StorageError: as ``export_model``.
    """
    _check_options(bits, flavour)
    report = progress or no_progress
    with open_source(source) as opened:
        sha256 = _fingerprint(opened, packages_folder(cache_dir), report)
        key = f"{sha256[:16]}-v{EXPORTER_VERSION}-{flavour}-{bits}"
        folder = package_folder(cache_dir, opened.name, key)
        with contextlib.suppress(ModelError):
            return _current(open_package(folder), opened)
        make_folder(folder.parent)
        with (
            storage_errors(folder.parent),
            file_lock(folder.with_name(folder.name + ".lock"), f"exporting {opened.name}", notice=notice),
        ):
            with contextlib.suppress(ModelError):  # another process made it while this one waited
                return _current(open_package(folder), opened)
            return _export(opened, sha256, folder, bits, flavour, report)


def _current(package: Package, source: Source) -> Package:
    """Raises ModelError when the same content would give another manifest: the file was moved, or the package is
    older than what we read of files."""
    link = package.manifest.link
    if package.manifest.kv != kv_settings(source) or (link is not None and link != link_to(source)):
        raise ModelError(f"{package.folder} is out of date; export the model again")
    return package


def _check_options(bits: int, flavour: str) -> None:
    if bits not in BITS:
        raise OptionError(f"bits is {bits}; supported: {', '.join(map(str, BITS))}")
    if flavour not in FLAVOURS and flavour not in UNLISTED:
        raise OptionError(f"flavour is {flavour!r}; supported: {', '.join(FLAVOURS)}")


def _export(
    source: Source, sha256: str | None, out: Path, bits: int, flavour: str, progress: Progress
) -> Package:
    """Looks at all that may be refused before the source is hashed or a byte is written."""
    made: Callable[..., Flavour] = UNLISTED[flavour] if flavour in UNLISTED else FLAVOURS[flavour]
    writer = made(read_model(source), source, bits)
    settings, make_tokenizer = _tokenizer(source, writer.model.spec.vocab)
    sha256 = sha256 or source.hash(progress)
    with temporary_folder(out, bytes_needed=writer.bytes_needed + TOKENIZER_BYTES) as folder:
        records = writer.write(folder, progress)
        make_tokenizer().save(str(folder / TOKENIZER_FILE), pretty=False)
        manifest = Manifest(
            spec=writer.model.spec,
            tokenizer=settings,
            flavour=flavour,
            bits=bits,
            source_name=source.path.absolute().name,
            source_bytes=source.size,
            source_sha256=sha256,
            exporter_version=EXPORTER_VERSION,
            matrices=tuple(record.to_json() for record in records),
            files=record_files(folder, LINKED_FILES if flavour == LINKED else REQUIRED_FILES),
            kv=kv_settings(source),
            link=link_to(source) if flavour == LINKED else None,
        )
        write_manifest(folder, manifest)
    return Package(out, manifest)


def _tokenizer(source: Source, vocab: int) -> tuple[TokenizerSettings, Callable[[], Tokenizer]]:
    """The settings of the source's tokenizer, and what makes the tokenizer itself."""
    ready = ready_tokenizer(source, vocab)
    if ready is not None:
        settings, tokenizer = ready.settings, ready.tokenizer
        return settings, lambda: tokenizer  # without its record, which can take hundreds of megabytes
    return TokenizerSettings.from_metadata(source.metadata), lambda: build_tokenizer(source.metadata)


def _fingerprint(source: Source, folder: Path, progress: Progress) -> str:
    """The source's SHA-256, remembered by path and ``Source.mark`` so that a start need not read it all again."""
    index = folder / FINGERPRINTS_FILE
    key = str(source.path.absolute())
    mark = source.mark
    known = _read_fingerprints(index)
    entry = known.get(key)
    if entry is not None and entry[:3] == mark:
        return str(entry[3])
    sha256 = source.hash(progress)
    kept = {path: value for path, value in known.items() if Path(path).exists()}
    # only a shortcut: where it cannot be kept, the next start hashes again
    with contextlib.suppress(StorageError), temporary_file(index) as file:
        file.write(json.dumps({**kept, key: [*mark, sha256]}, indent=1).encode())
    return sha256


def _read_fingerprints(index: Path) -> dict[str, list[int | str]]:
    try:
        value = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {
        path: entry
        for path, entry in value.items()
        if isinstance(entry, list) and len(entry) == 4 and isinstance(entry[3], str) and len(entry[3]) == 64
    }
