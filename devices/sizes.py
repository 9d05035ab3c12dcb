"""Sizes as people write them: ``1.2GB`` and back.

Decimal units (KB, MB, GB, TB) count in thousands and binary ones (KiB, MiB, GiB, TiB) in 1024s, everywhere in
Satchel, so that a limit means the same number in a flag, in a message and in a report.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ..errors import OptionError

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_DECIMAL = ("B", "KB", "MB", "GB", "TB")
_SIZE = re.compile(r"\s*([0-9]{1,24}(?:\.[0-9]{0,24})?|\.[0-9]{1,24})\s*([A-Za-z]{0,3})\s*")
_TOKENS = re.compile(r"\s*([0-9]{1,12})\s*([kKmM]?)\s*", re.ASCII)
_LARGEST_BYTES = 2**63 - 1  # what a 64-bit file offset can hold
_EXAMPLES = "write it like 800MB, 1.2GB, 2GiB or 1500000000 (bytes)"


def parse_size(text: str | int) -> int:
    """The number of bytes that ``text`` names; a fraction of a byte is dropped.

    Letter case does not matter, and a space before the unit is allowed. An ``int`` is taken as bytes.

    Raises:
        OptionError: not a number with a known unit, negative, or beyond 64 bits.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = Fraction(text)
    else:
        match = _SIZE.fullmatch(text) if isinstance(text, str) else None
        factor = _UNITS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise OptionError(f"{_shown(text)} is not a size: {_EXAMPLES}")
        size = Fraction(match[1]) * factor
        if factor == 1 and size.denominator != 1:
            raise OptionError(f"{_shown(text)} is not a number of bytes, a unit is missing: {_EXAMPLES}")
    if not 0 <= size <= _LARGEST_BYTES:
        raise OptionError(
            f"the size {_shown(text)} is outside of 0 to {format_size(_LARGEST_BYTES)}: {_EXAMPLES}"
        )
    return int(size)


def parse_tokens(text: str | int) -> int:
    """A number of tokens: ``32768``, or in 1024s as contexts are named: ``128K`` is 131072, ``1M`` 1048576.

    Raises:
        OptionError: not a whole number above 0, or beyond 2^31.
    """
    match = _TOKENS.fullmatch(str(text))
    count = int(match[1]) * 1024 ** " km".index(match[2].lower() or " ") if match else 0
    if not 1 <= count < 2**31:
        raise OptionError(f"{_shown(text)} is not a number of tokens: write it like 32768, 128K or 1M")
    return count


def format_size(size_bytes: int, *, round_up: bool = False) -> str:
    """``size_bytes`` in the largest decimal unit that fits, three significant digits: ``1.23GB``.

    The text is what `parse_size` reads. With ``round_up`` it never names less than ``size_bytes``: use it for
    "the smallest limit that would work", which a person copies into the next command.
    """
    if size_bytes < 0:
        return "-" + format_size(-size_bytes)
    for power, unit in enumerate(_DECIMAL):
        scale = 1000**power
        for digits in (2, 1, 0):
            steps = Fraction(size_bytes * 10**digits, scale)
            count = -(-steps.numerator // steps.denominator) if round_up else round(steps)
            if count < 1000:
                return _number(count, digits) + unit
    return f"{count}{unit}"


def _number(count: int, digits: int) -> str:
    text = f"{count / 10**digits:.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else text


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
