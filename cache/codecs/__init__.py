"""Codecs: how pairs are stored below the hot tier. A new one is a file here and a row in the table of the test.

``find_codec`` makes one by name; tests/cache/test_codecs.py runs the same checks over all of them.
"""

from __future__ import annotations

from .base import Codec
from .f16 import F16
from .grouped import Grouped2, Grouped3, Grouped4
from .kvquant import KVQuant2, KVQuant3, KVQuant4
from .mikv import MiKV
from .q2 import Q2
from .q4 import Q4
from .q8 import Q8

_CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (F16, Q8, Q4, Q2, Grouped4, Grouped3, Grouped2, KVQuant4, KVQuant3, KVQuant2, MiKV)
}


def codec_names() -> tuple[str, ...]:
    """The names of all codecs."""
    return tuple(_CODECS)


def find_codec(name: str) -> Codec:
    """A new codec; KeyError for a name that `codec_names` does not list (settings are checked before)."""
    return _CODECS[name]()


__all__ = ["Codec", "codec_names", "find_codec"]
