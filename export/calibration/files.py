"""What calibration leaves in a package: ``calibration/calibration.json`` and a ``.safetensors`` file per method.

The record says which package it was made from: one that has changed since is refused, as its heads would rank pairs by
features that are no more. Written by numpy (a header and floats), each file complete or not at all.
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
FORMAT, FORMAT_VERSION = "satchel-calibration", 1
MAX_RECORD_BYTES = 1 << 20
NAME_OF_WEIGHT, NAME_OF_BIAS = "layers.{}.retention.weight", "layers.{}.retention.bias"


@dataclass(frozen=True)
class RetentionHeads:
    """One linear map per layer, from what its attention reads to a score for each KV head.

    ``weights`` float32 [L, K, hidden], ``biases`` float32 [L, K]; ``sha256``: of the file, in hex digits.
    """

    method: str
    weights: Floats
    biases: Floats
    sha256: str


def calibration_folder(package: Package) -> Path:
    """Where a package's calibration lies, or would."""
    return package.folder / CALIBRATION_FOLDER


def package_mark(package: Package) -> str:
    """What a calibration belongs to: the package's fingerprint, whatever its positions are stretched to."""
    return replace(package, yarn_factor=1.0).fingerprint


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records in the package ``folder`` by method; none where nothing was calibrated.

    Raises:
        ModelError: ``calibration.json`` is there and cannot be used.
    """
    path = folder / CALIBRATION_FOLDER / CALIBRATION_FILE
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


def write_retention(
    package: Package, method: str, weights: Floats, biases: Floats, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes heads (shapes as in `RetentionHeads`) and their record, which is returned. Other methods' stay.

    Raises:
        StorageError: the package's folder cannot take them.
        ModelError: the record of other methods there is damaged.
    """
    tensors = {}
    for layer in range(len(weights)):
        tensors[NAME_OF_WEIGHT.format(layer)] = weights[layer]
        tensors[NAME_OF_BIAS.format(layer)] = biases[layer]
    content = _safetensors(tensors)
    folder, name = calibration_folder(package), f"{method}.safetensors"
    record = {
        "file": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
        "package": package_mark(package), **figures,
    }  # fmt: skip
    methods = read_records(package.folder) | {method: record}
    with temporary_file(folder / name, bytes_needed=len(content)) as file:
        file.write(content)
    value = {"format": FORMAT, "format_version": FORMAT_VERSION, "methods": methods}
    with temporary_file(folder / CALIBRATION_FILE) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
    return record


def open_retention(package: Package, method: str) -> RetentionHeads:
    """The heads of ``method``, checked against their record and the package.

    Raises:
        ModelError: the package was not calibrated, was changed since, or its files are damaged.
    """
    record = read_records(package.folder).get(method)
    command = f"satchel calibrate MODEL --method {method}"
    if record is None:
        raise ModelError(f"{package.folder} has no calibration for {method}; make it once: {command}")
    if record.get("package") != package_mark(package):
        raise ModelError(
            f"the calibration for {method} in {package.folder} is of another package; repeat it: {command}"
        )
    path = calibration_folder(package) / f"{method}.safetensors"
    try:
        if path.stat().st_size != record.get("bytes") or hash_file(path) != record.get("sha256"):
            raise ModelError(f"{path} is not what its record says; repeat the calibration: {command}")
        weights, biases = _read_heads(path, package)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); repeat the calibration: {command}") from None
    if not np.isfinite(weights).all() or not np.isfinite(biases).all():
        raise ModelError(f"{path} holds NaN or infinity; repeat the calibration: {command}")
    return RetentionHeads(method, weights, biases, str(record["sha256"]))


def _read_heads(path: Path, package: Package) -> tuple[Floats, Floats]:
    spec = package.spec
    weights = np.empty((spec.layers, spec.kv_heads, spec.hidden), np.float32)
    biases = np.empty((spec.layers, spec.kv_heads), np.float32)
    with path.open("rb", buffering=0) as file:
        tensors = read_safetensors(path, file)
        for layer in range(spec.layers):
            for into, name in ((weights[layer], NAME_OF_WEIGHT), (biases[layer], NAME_OF_BIAS)):
                tensor = tensors.get(name.format(layer))
                if tensor is None or tensor.type_name != "F32" or tensor.shape != into.shape:
                    raise ModelError(f"{path} has no {name.format(layer)} of shape {into.shape}; calibrate again")
                into[:] = tensor.read_rows(0, tensor.rows).view("<f4").reshape(into.shape)
    return weights, biases


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
