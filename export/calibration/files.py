"""What calibration leaves in a package: ``calibration/calibration.json`` and a ``.safetensors`` file per method.

The record says which package it was made from: one that has changed since is refused, as its heads would rank pairs by
features that are no more. Written by numpy (a header and floats), each file complete or not at all.

What we have calibrated ourselves is shipped in `SHIPPED`, a folder with such files for each model. It serves any
package that comes from the same source file; what a package has of its own goes before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...devices.files.safe_write import temporary_file
from ...errors import ModelError
from ..package import Package, hash_file
from ..sources.safetensors import read_safetensors

Floats = npt.NDArray[np.float32]

CALIBRATION_FOLDER, CALIBRATION_FILE = "calibration", "calibration.json"
SHIPPED = Path(__file__).with_name("shipped")
FORMAT, FORMAT_VERSION = "satchel-calibration", 1
MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class Calibration:
    """What a method has left in a package: float32 ``tensors`` by name; ``sha256``: of their file, in hex digits."""

    method: str
    tensors: Mapping[str, Floats]
    sha256: str


@dataclass(frozen=True)
class Record:
    """What `satchel calibrate` said of a method, and where its tensors lie. ``problem``: why they are of no use."""

    folder: Path
    figures: Mapping[str, Any]
    is_shipped: bool
    problem: str | None = None


def calibration_folder(package: Package) -> Path:
    """Where a package's calibration lies, or would."""
    return package.folder / CALIBRATION_FOLDER


def package_mark(package: Package) -> str:
    """What a calibration belongs to: the package's fingerprint, whatever its positions are stretched to."""
    return replace(package, yarn_factor=1.0).fingerprint


def find_records(package: Package) -> dict[str, Record]:
    """What ``package`` is calibrated for, by method: its own, and what is shipped for its source.

    Raises:
        ModelError: ``calibration.json`` is there and cannot be used.
    """
    found, mark = {}, package_mark(package)
    for folder in sorted(SHIPPED.iterdir()) if SHIPPED.is_dir() else ():
        for method, figures in _read(folder).items():
            if figures.get("source") == package.manifest.source_sha256:
                found[method] = Record(folder, figures, is_shipped=True)
    for method, figures in read_records(package.folder).items():
        problem = None if figures.get("package") == mark else "of another package"
        found[method] = Record(calibration_folder(package), figures, is_shipped=False, problem=problem)
    return found


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records in the package ``folder`` by method, without what is shipped. Raises as `find_records`."""
    return _read(folder / CALIBRATION_FOLDER)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / CALIBRATION_FILE
    remedy = f"remove {path.parent} and run 'satchel calibrate' again"
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise ModelError(f"{path} is {path.stat().st_size} bytes long, no such record is; {remedy}")
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is damaged (not JSON); {remedy}") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    methods = value.get("methods") if isinstance(value, dict) and value.get("format") == FORMAT else None
    if not isinstance(methods, dict) or not all(isinstance(record, dict) for record in methods.values()):
        raise ModelError(f"{path} is not a record of calibrations; {remedy}")
    if value.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"{path} has format version {str(value.get('format_version'))[:20]}, this Satchel reads {FORMAT_VERSION}; "
            f"{remedy}"
        )
    return methods


def write_calibration(
    package: Package, method: str, tensors: Mapping[str, Floats], figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes ``tensors`` (float32) and their record, which is returned. Other methods' stay.

    Raises:
        StorageError: the package's folder cannot take them.
        ModelError: the record of other methods there is damaged.
    """
    content = _safetensors(tensors)
    folder, name = calibration_folder(package), f"{method}.safetensors"
    record = {
        "file": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
        "package": package_mark(package), "source": package.manifest.source_sha256, **figures,
    }  # fmt: skip
    methods = read_records(package.folder) | {method: record}
    with temporary_file(folder / name, bytes_needed=len(content)) as file:
        file.write(content)
    value = {"format": FORMAT, "format_version": FORMAT_VERSION, "methods": methods}
    with temporary_file(folder / CALIBRATION_FILE) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
    return record


def open_calibration(package: Package, method: str, shapes: Mapping[str, tuple[int, ...]]) -> Calibration:
    """What ``method`` has left: tensors of these names and ``shapes``, checked against their record and the package.

    Raises:
        ModelError: the package was not calibrated, was changed since, or its files are damaged.
    """
    record = find_records(package).get(method)
    command = f"satchel calibrate MODEL --method {method}"
    if record is None:
        raise ModelError(f"{package.folder} has no calibration for {method}; make it once: {command}")
    if record.problem is not None:
        raise ModelError(f"the calibration for {method} in {package.folder} is {record.problem}; repeat it: {command}")
    path, figures = record.folder / f"{method}.safetensors", record.figures
    try:
        if path.stat().st_size != figures.get("bytes") or hash_file(path) != figures.get("sha256"):
            raise ModelError(f"{path} is not what its record says; repeat the calibration: {command}")
        tensors = _read_tensors(path, shapes)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); repeat the calibration: {command}") from None
    if not all(np.isfinite(values).all() for values in tensors.values()):
        raise ModelError(f"{path} holds NaN or infinity; repeat the calibration: {command}")
    return Calibration(method, tensors, str(figures["sha256"]))


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Floats]:
    found: dict[str, Floats] = {}
    with path.open("rb", buffering=0) as file:
        tensors = read_safetensors(path, file)
        for name, shape in shapes.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.type_name != "F32" or tensor.shape != shape:
                raise ModelError(f"{path} has no {name} of shape {shape}; calibrate again")
            found[name] = tensor.read_rows(0, tensor.rows).view("<f4").reshape(shape)
    return found


def _safetensors(tensors: Mapping[str, Floats]) -> bytes:
    """A file of float32 tensors: 8 bytes of length, a JSON header padded to 8 bytes, then the numbers."""
    header: dict[str, Any] = {}
    at = 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = [np.ascontiguousarray(values, "<f4").tobytes() for values in tensors.values()]
    return b"".join([len(text).to_bytes(8, "little"), text, *data])
