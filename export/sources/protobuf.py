"""Protocol buffers' wire format, walked in a file instead of loaded from it.

An ONNX graph may carry two gigabytes of weights within; the ``onnx`` package would hold them all to name one. Here
a message is a range of bytes, and what nobody asks for is stepped over. Every length is checked against the message
that it is in, and the number of fields is bounded, so that a crafted file costs half a minute at worst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from ...errors import ModelError

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
MAX_FIELDS = 4_000_000  # 64 layers of Gemma have 160,000; 48 layers of 128 experts 3,300,000
MAX_TEXT = 4096
WINDOW_BYTES = 1 << 16


class Field(NamedTuple):
    """One field: its number and kind, a varint's value, and the range of bytes of its content."""

    number: int
    wire: int
    value: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class ProtoFile:
    """The outermost message of an open file."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file
        self._window = b""
        self._at = 0  # where the window begins
        self._left = MAX_FIELDS
        try:
            self.size = file.seek(0, 2)
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror})") from None

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        """The fields of the message at start … stop−1.

        Raises:
            ModelError: the bytes are no message, or the file has more fields than any model.
        """
        at = start
        while at < stop:
            self._left -= 1
            if self._left < 0:
                raise self.damaged(f"it has more than {MAX_FIELDS} fields")
            key, at = self._varint(at, stop)
            number, wire, value = key >> 3, key & 7, 0
            begin = at
            if wire == VARINT:
                value, at = self._varint(at, stop)
            elif wire == LENGTH:
                length, begin = self._varint(at, stop)
                at = begin + length
            elif wire in (FIXED64, FIXED32):
                at += 8 if wire == FIXED64 else 4
            else:
                raise self.damaged(f"it has a field of kind {wire} at byte {start}")
            if at > stop:
                raise self.damaged(f"a field would end at byte {at}, what it is in ends at {stop} (cut short?)")
            yield Field(number, wire, value, begin, at)

    def message(self, field: Field) -> Iterator[Field]:
        """The fields of the message that ``field`` is."""
        if field.wire != LENGTH:
            raise self.damaged(f"there is no message at byte {field.start}")
        return self.fields(field.start, field.stop)

    def text(self, field: Field) -> str:
        """A short text."""
        if field.wire != LENGTH or field.size > MAX_TEXT:
            raise self.damaged(f"there is no text of at most {MAX_TEXT} bytes at byte {field.start}")
        try:
            return self._bytes(field.start, field.size).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"the text at byte {field.start} is not UTF-8") from None

    def integers(self, field: Field, most: int) -> list[int]:
        """The signed integers of a repeated field: one, or several packed ones."""
        if field.wire == VARINT:
            return [_signed(field.value)]
        if field.wire != LENGTH or field.size > 10 * most:
            raise self.damaged(f"there is no list of at most {most} numbers at byte {field.start}")
        found, at = [], field.start
        while at < field.stop:
            value, at = self._varint(at, field.stop)
            found.append(_signed(value))
        return found

    def number(self, field: Field) -> float:
        """A float32."""
        if field.wire != FIXED32:
            raise self.damaged(f"there is no number at byte {field.start}")
        value: float = struct.unpack("<f", self._bytes(field.start, 4))[0]
        return value

    def damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is not a valid ONNX file: {what}; download it or export it again")

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        """(value, where it ends)"""
        value = 0
        data = self._bytes(at, min(10, stop - at))
        for index, byte in enumerate(data):
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at + index + 1
        raise self.damaged(f"a number at byte {at} does not end")

    def _bytes(self, start: int, count: int) -> bytes:
        first = start - self._at
        if first < 0 or first + count > len(self._window):
            try:
                self._file.seek(start)
                self._window, self._at, first = self._file.read(WINDOW_BYTES), start, 0
            except OSError as error:
                raise ModelError(f"{self.path} cannot be read ({error.strerror})") from None
            if len(self._window) < count:
                raise self.damaged(f"it ends inside the {count} bytes at byte {start}")
        return self._window[first : first + count]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
