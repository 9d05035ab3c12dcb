"""The devices that a model can run on, and the ONNX Runtime package that each needs."""

from __future__ import annotations

from dataclasses import dataclass

import onnxruntime as ort

from ...errors import OptionError


@dataclass(frozen=True)
class Device:
    """``provider``: ONNX Runtime's name; ``memory``: where its tensors lie; ``package``: what to install for it."""

    provider: str
    memory: str
    package: str
    options: tuple[tuple[str, str], ...] = ()


DEVICES = {
    "cpu": Device("CPUExecutionProvider", "cpu", "onnxruntime"),
    # tensors grow by a token each step: an arena that doubled each time would soon hold twice what is used
    "cuda": Device(
        "CUDAExecutionProvider", "cuda", "onnxruntime-gpu", (("arena_extend_strategy", "kSameAsRequested"),)
    ),
    "dml": Device("DmlExecutionProvider", "dml", "onnxruntime-directml (Windows)"),
    "coreml": Device("CoreMLExecutionProvider", "cpu", "onnxruntime for macOS"),
}


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        OptionError: there is none, or the installed ONNX Runtime cannot use it.
    """
    device = DEVICES.get(name)
    if device is None:
        raise OptionError(f"device {name!r} is not supported by this version; use {', '.join(DEVICES)}")
    available = ort.get_available_providers()
    if device.provider not in available:
        raise OptionError(
            f"device {name!r} needs ONNX Runtime's {device.provider}, the installed one has {', '.join(available)}; "
            f"install {device.package} in place of onnxruntime, or use device cpu"
        )
    return device
