"""The models that Satchel knows by name, and where their files come from.

``registry.json`` beside this module is the list; a new model is one more entry there. It is read once and
checked key by key, so that a typo in it is found by the first test and not by the first user.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import ModelError

DEFAULT_MODEL = "qwen2.5-coder-0.5b-instruct"
REGISTRY_PATH = Path(__file__).with_name("registry.json")
KINDS = ("instruct", "base")

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")  # a name is also a file name
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file of a Hugging Face repository; ``file`` is None where we know of no GGUF file in it."""

    repo: str
    file: str | None


@dataclass(frozen=True)
class IndexMember:
    """One piece of a model: a member inside a wheel on the Python package index."""

    package: str
    version: str
    member: str
    bytes: int


@dataclass(frozen=True)
class ModelEntry:
    """One model of the registry. ``bytes`` and ``sha256`` are of the index members joined in order."""

    name: str
    architecture: str
    supported: bool
    kind: str
    context_tokens: int
    quantization: str
    bytes: int
    sha256: str
    licence: str
    hub: HubFile
    index: tuple[IndexMember, ...]
    note: str


def all_models() -> tuple[ModelEntry, ...]:
    """All models of the registry, the default one first."""
    return _load()


def find(name: str) -> ModelEntry:
    """The entry called ``name``.

    Raises:
        ModelError: there is none; the message has the nearest names and the whole list.
    """
    entries = {entry.name: entry for entry in all_models()}
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(name.lower(), entries, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ModelError(f"no model is called {name!r}: {hint}the registry has {', '.join(entries)}; "
                     "a path to a .gguf file works as well")


@functools.cache
def _load() -> tuple[ModelEntry, ...]:
    return parse_registry(REGISTRY_PATH.read_text(encoding="utf-8"))


def parse_registry(text: str) -> tuple[ModelEntry, ...]:
    """The entries of a registry file's text, the default model first.

    Raises:
        ModelError: a key is missing, unknown or of the wrong type, or a value contradicts another.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ModelError(f"the model registry is not JSON: {error}") from None
    entries = [_entry(item) for item in _list(_Fields(raw, "the registry").only("models"), "models")]
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ModelError(f"the model registry has {name!r} {names.count(name)} times; names are unique")
    return tuple(sorted(entries, key=lambda entry: entry.name != DEFAULT_MODEL))


class _Fields:
    """A JSON object whose keys are taken one by one with their type; what is left over is refused."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, Mapping):
            raise ModelError(f"{where} of the model registry is {type(raw).__name__}, not an object")
        self.raw, self.where = raw, where

    def only(self, *known: str) -> _Fields:
        """Refuses keys that are not ``known`` and known ones that are missing."""
        wrong = sorted(set(self.raw) ^ set(known))
        if wrong:
            raise ModelError(f"{self.where} of the model registry: missing or unknown {', '.join(wrong)}; "
                             f"the keys are {', '.join(known)}")
        return self

    def text(self, key: str) -> str:
        value = self.raw[key]
        if not isinstance(value, str) or not value:
            raise ModelError(f"{self.where} of the model registry: {key} is {value!r}, not a text")
        return value

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.text(key)
        if not pattern.fullmatch(value):
            raise ModelError(f"{self.where} of the model registry: {key} {value!r} does not match "
                             f"{pattern.pattern}")
        return value

    def count(self, key: str) -> int:
        value = self.raw[key]
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(f"{self.where} of the model registry: {key} is {value!r}, not a number above 0")
        return value

    def flag(self, key: str) -> bool:
        value = self.raw[key]
        if not isinstance(value, bool):
            raise ModelError(f"{self.where} of the model registry: {key} is {value!r}, not true or false")
        return value


def _list(fields: _Fields, key: str) -> list[object]:
    value = fields.raw[key]
    if not isinstance(value, list):
        raise ModelError(f"{fields.where} of the model registry: {key} is {type(value).__name__}, not a list")
    return value


def _entry(raw: object) -> ModelEntry:
    name = _Fields(raw, "a model").raw.get("name")
    fields = _Fields(raw, f"model {name!r}").only(*ModelEntry.__dataclass_fields__)
    hub = _Fields(fields.raw["hub"], f"hub of {name!r}").only("repo", "file")
    entry = ModelEntry(
        name=fields.matching("name", _NAME),
        architecture=fields.text("architecture"),
        supported=fields.flag("supported"),
        kind=fields.text("kind"),
        context_tokens=fields.count("context_tokens"),
        quantization=fields.text("quantization"),
        bytes=fields.count("bytes"),
        sha256=fields.matching("sha256", _SHA256),
        licence=fields.text("licence"),
        hub=HubFile(hub.text("repo"), None if hub.raw["file"] is None else hub.text("file")),
        index=tuple(_member(item, str(name)) for item in _list(fields, "index")),
        note=fields.text("note"),
    )
    if entry.kind not in KINDS:
        raise ModelError(f"model {name!r} of the model registry: kind {entry.kind!r} is none of "
                         f"{', '.join(KINDS)}")
    joined = sum(member.bytes for member in entry.index)
    if entry.index and joined != entry.bytes:
        raise ModelError(f"model {name!r} of the model registry: its members have {joined} bytes, "
                         f"the model {entry.bytes}")
    return entry


def _member(raw: object, name: str) -> IndexMember:
    fields = _Fields(raw, f"index of {name!r}").only(*IndexMember.__dataclass_fields__)
    return IndexMember(fields.text("package"), fields.text("version"), fields.text("member"),
                       fields.count("bytes"))
