"""What a snapshot says about itself: whose cache it is, of which tokens, read with which settings."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SnapshotError
from .snapshot import Snapshot

TOKENS = "tokens"  # the section with the token ids, uint32
SUFFIX = ".satchel"
HEAD_TOKENS = 32  # a snapshot that differs within these is not worth opening
_MAX_TOKENS = 1 << 31
_MAX_DOCUMENTS, _MAX_NAME = 1000, 300  # of a folder with more, the first ones are named
_FINGERPRINT = re.compile(r"[0-9a-f]{16,64}")
_NAME_DIGITS = 16  # of fingerprint and settings key in a folder's name; the whole ones are in the metadata

Tokens = NDArray[np.uint32]


@dataclass(frozen=True)
class Subject:
    """What a snapshot is of. ``settings`` are all those that change what the cache holds, as plain JSON values."""

    model_fingerprint: str
    model_name: str
    settings: Mapping[str, Any]
    documents: Sequence[str] = ()

    @property
    def settings_key(self) -> str:
        return settings_key(self.settings)


@dataclass(frozen=True)
class Entry:
    """A snapshot file as a list shows it; ``problem`` is empty unless it cannot be used, and then little else is set.

    Times are in seconds since 1970. ``extra`` is what the runtime put there for itself.
    """

    path: Path
    id: str
    file_bytes: int
    last_used: float
    problem: str = ""
    tokens: int = 0
    head: str = ""
    model_fingerprint: str = ""
    model_name: str = ""
    settings_key: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    documents: tuple[str, ...] = ()
    document_count: int = 0
    created: float = 0.0
    satchel_version: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, snapshot: Snapshot) -> Entry:
        """Reads and checks the metadata of an open snapshot. Raises SnapshotError."""
        metadata = snapshot.metadata
        try:
            model = _get(metadata, "model", dict)
            documents = [_name(document) for document in _get(metadata, "documents", list)]
            return cls(
                snapshot.path, entry_id(snapshot.path), snapshot.file_bytes, snapshot.path.stat().st_mtime,
                tokens=_count(metadata, "tokens", _MAX_TOKENS),
                head=_get(metadata, "head", str),
                model_fingerprint=_get(model, "fingerprint", str),
                model_name=_name(_get(model, "name", str)),
                settings_key=_get(metadata, "settings_key", str),
                settings=_get(metadata, "settings", dict),
                documents=tuple(documents),
                document_count=_count(metadata, "document_count", 1 << 40),
                created=float(_count(metadata, "created", 1 << 40)),
                satchel_version=_name(_get(metadata, "satchel", str)),
                extra=_get(metadata, "extra", dict),
            )  # fmt: skip
        except _Unfit as error:
            raise SnapshotError(f"the snapshot {snapshot.path} cannot be used: its metadata lacks {error}; remove the "
                                "file, and the document is read again") from None
        except OSError as error:
            raise SnapshotError(f"the snapshot {snapshot.path} was just removed ({error.strerror}); the document is "
                                "read again", damaged=False) from None

    @classmethod
    def unusable(cls, path: Path, problem: str) -> Entry:
        """An entry for a file that cannot be opened. Raises OSError when there is none."""
        status = path.stat()
        return cls(path, entry_id(path), status.st_size, status.st_mtime, problem)


def settings_key(settings: Mapping[str, Any]) -> str:
    """Hex digits that stand for settings: equal for equal values, whatever their order."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def token_array(token_ids: Sequence[int] | Tokens) -> Tokens:
    """Token ids as they are stored: uint32, little-endian."""
    return np.ascontiguousarray(token_ids, dtype="<u4")


def head_of(tokens: Tokens) -> str:
    """Stands for the first `HEAD_TOKENS` tokens; empty when there are fewer."""
    return "" if len(tokens) < HEAD_TOKENS else hashlib.sha256(tokens[:HEAD_TOKENS].tobytes()).hexdigest()[:16]


def folder_name(model_fingerprint: str, key: str) -> str:
    """The folder of the snapshots of a model with some settings."""
    assert _FINGERPRINT.fullmatch(model_fingerprint), model_fingerprint
    assert _FINGERPRINT.fullmatch(key), key
    return f"{model_fingerprint[:_NAME_DIGITS]}-{key[:_NAME_DIGITS]}"


def file_name(tokens: Tokens) -> str:
    """The name of the snapshot of exactly these tokens."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:32] + SUFFIX


def entry_id(path: Path) -> str:
    """What a person calls a snapshot: 12 hex digits; the same tokens may lie in the folders of several settings."""
    return hashlib.sha256(f"{path.parent.name}/{path.name}".encode(errors="replace")).hexdigest()[:12]


def metadata_of(subject: Subject, tokens: Tokens, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What is written into the file; `Entry.of` reads it."""
    return {
        "satchel": _own_version(),
        "created": int(time.time()),
        "model": {"fingerprint": subject.model_fingerprint, "name": subject.model_name[:_MAX_NAME]},
        "settings_key": subject.settings_key,
        "settings": dict(subject.settings),
        "documents": [str(document)[-_MAX_NAME:] for document in subject.documents[:_MAX_DOCUMENTS]],
        "document_count": len(subject.documents),
        "tokens": len(tokens),
        "head": head_of(tokens),
        "extra": dict(extra),
    }


def _own_version() -> str:
    try:
        return version("satchel")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


class _Unfit(Exception):
    """The name of what is missing or of the wrong kind."""


def _get(values: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    value = values.get(name)
    if type(value) is not kind:
        raise _Unfit(f"a proper {name!r}")
    return value


def _count(values: Mapping[str, Any], name: str, limit: int) -> int:
    value = _get(values, name, int)
    if not 0 <= value <= limit:
        raise _Unfit(f"a proper {name!r}")
    return int(value)


def _name(value: object) -> str:
    """A name to show on a terminal, which may come from a file made by anybody."""
    if not isinstance(value, str) or len(value) > 2 * _MAX_NAME:
        raise _Unfit("proper names")
    return "".join(letter if letter.isprintable() else "?" for letter in value)
