"""Head profiles: which KV heads need the whole text. One file per method; a new one is a file here and a row below.

`ALL` is none of them: every head sees everything. tests/cache/test_head_profiles.py runs the same checks over the rest.
"""

from __future__ import annotations

from .base import HeadProfile, StreamingHeads, marks_of
from .duo import Duo
from .hybrid import Hybrid
from .razor import Razor

ALL = "all"
_PROFILES: dict[str, type[HeadProfile]] = {profile.name: profile for profile in (Razor, Duo, Hybrid)}


def profile_names() -> tuple[str, ...]:
    """The names of all head profiles; `ALL` is not among them."""
    return tuple(_PROFILES)


def ranked_profiles() -> tuple[str, ...]:
    """Those that rank heads: the package must be calibrated for them."""
    return tuple(name for name, profile in _PROFILES.items() if profile.calibrated)


def find_profile(name: str) -> HeadProfile:
    """A head profile; KeyError for a name that `profile_names` does not list (settings are checked before)."""
    return _PROFILES[name]()


__all__ = ["ALL", "HeadProfile", "StreamingHeads", "find_profile", "marks_of", "profile_names", "ranked_profiles"]
