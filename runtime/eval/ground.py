"""What all evaluations of one model share, opened once: package, tokenizer, text, and where results lie."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...devices.files.cache_folder import cache_folder
from ...devices.machine import cores_usable
from ...devices.reporting import Notice, Progress, log_notice, no_progress
from ...errors import ContextLengthError, ModelError
from ...export.calibration.files import find_records
from ...export.package import Package
from ...export.resolve import resolve_model
from ..bench.run import PEER, peer_file
from ..chat_template import ChatTemplate
from ..documents import read_documents
from ..engines.rules import NATIVE, find_rules
from ..tokenizer import Tokenizer
from .haystack import Haystack
from .llama_cpp_runner import LlamaCppRunner
from .results import Results
from .satchel_runner import SatchelRunner
from .sides import Runner, Side
from .sizing import Speaker
from .suite import Asked, Suite

FOLDER = "eval"  # below the cache folder


@dataclass(frozen=True)
class Ground:
    """``model`` as it was named; ``peer``: the .gguf that llama.cpp reads, if it is a side; ``folder`` of results."""

    model: str
    package: Package
    speaker: Speaker
    haystack: Haystack
    peer: Path | None
    folder: Path
    threads: int
    notice: Notice

    def open_side(self, side: Side, context: int) -> Runner:
        """The side with its model loaded. Raises as `load`."""
        if not side.kv_type:
            return SatchelRunner(self.package.folder, side, threads=self.threads, notice=self.notice)
        assert self.peer is not None, "found by lay_ground"
        vocab = self.package.spec.vocab
        return LlamaCppRunner(
            self.peer, side.kv_type, self.speaker, context=context, threads=self.threads, vocab=vocab
        )

    def results(self, suite: Suite, asked: Asked, sides: Sequence[Side]) -> dict[str, dict[str, Results]]:
        """What is done already, by side, then by task."""
        labels = [side.label for side in sides]
        found: dict[str, dict[str, Results]] = {}
        kv = self.package.manifest.kv
        file_settings = {"file_kv": dict(kv)} if kv else {}
        for side in sides:
            identity = dict(side.identity) | _calibration(side, self.package)
            if side.kv_type and self.peer is not None:
                identity |= {"file": self.peer.name, "file_bytes": self.peer.stat().st_size}
            if suite.compares_rows and side.label != side.reference and side.reference in labels:
                identity["reference"] = side.reference
            about = {
                "model": self.package.fingerprint, "suite": suite.name, "context": asked.context, "seed": asked.seed,
                "text": asked.haystack.sha256, **suite.identity(asked), "side": identity, **file_settings,
            }  # fmt: skip
            found[side.label] = {task: Results(self.folder, {**about, "task": task}) for task in asked.tasks}
        return found


def lay_ground(
    model: str,
    *,
    context: int,
    text: Sequence[Path] = (),
    engine: str = NATIVE,
    peer: Path | None = None,
    threads: int | None = None,
    out: Path | None = None,
    cache_dir: Path | None = None,
    progress: Progress = no_progress,
    notice: Notice = log_notice,
) -> Ground:
    """Opens ``model`` for texts of ``context`` tokens; ``peer``: what llama.cpp reads (`find_peer`), if it is a side.

    Raises:
        ContextLengthError: the context is too large for the model.
        DocumentError, ModelError, DownloadError, StorageError: a file cannot be had.
    """
    linked = find_rules(engine).linked
    package = resolve_model(model, cache_dir=cache_dir, progress=progress, notice=notice, linked=linked)
    if context > package.spec.context_length:
        raise ContextLengthError(
            f"--context {context:,} is more than the {package.spec.context_length:,} tokens that the model "
            f"{model} reads; give {package.spec.context_length:,} or less"
        )
    folder = (out.expanduser().absolute() if out else cache_folder(cache_dir)) / FOLDER
    return Ground(
        model, package, _speaker(package), _haystack(text, notice), peer, folder, threads or cores_usable(), notice
    )


def calibrations_used(side: Side, records: Mapping[str, Any]) -> list[str]:
    """Which of the methods that ``records`` names (or a registry) the settings of a side name, too."""
    named = {side.policy, *(str(value) for value in side.kv.values())}
    return [name for name in records if name in named]


def _calibration(side: Side, package: Package) -> dict[str, str]:
    """Of a side that uses what was calibrated: another calibration, other results."""
    records = find_records(package)
    marks = [str(records[name].figures.get("sha256")) for name in sorted(calibrations_used(side, records))]
    return {"calibration": "+".join(marks)} if marks else {}


def _speaker(package: Package) -> Speaker:
    tokens = package.manifest.tokenizer
    tokenizer = Tokenizer.open(package.folder, tokens)

    def spelling(index: int | None) -> str:
        return "" if index is None else tokenizer.decode([index], special=True)

    template = ChatTemplate(
        tokens.chat_template, bos_token=spelling(tokens.bos_id), eos_token=spelling(tokens.eos_id)
    )
    return Speaker(tokenizer, template)


def _haystack(text: Sequence[Path], notice: Notice) -> Haystack:
    if not text:
        return Haystack.built_in()
    read = read_documents(list(text))
    for line in read.notices:
        notice(line)
    return Haystack(read.text)


def find_peer(
    model: str, cache_dir: Path | None = None, progress: Progress = no_progress, notice: Notice = log_notice
) -> Path:  # fmt: skip
    """The .gguf that llama.cpp shall read. Raises OptionError when it is not installed, ModelError for a folder."""
    if importlib.util.find_spec("llama_cpp") is not None and Path(model).expanduser().is_dir():
        raise ModelError(
            f"{model} is a folder, but {PEER} reads .gguf files: give the .gguf that it was made of as MODEL"
        )
    return peer_file(PEER, model, cache_dir, progress, notice)
