"""Retrievers: which archived blocks a query needs. One file per method; a new one is a file and a row in the table.

``find_retriever`` makes one by name; tests/cache/test_retrievers.py runs the same checks over all of them.
"""

from __future__ import annotations

from .base import Retriever
from .centroid import Centroid
from .channels import Channels
from .landmark import Landmark
from .minmax import MinMax
from .nothing import Nothing

_RETRIEVERS: dict[str, type[Retriever]] = {
    retriever.name: retriever for retriever in (Landmark, MinMax, Centroid, Channels, Nothing)
}


def retriever_names() -> tuple[str, ...]:
    """The names of all retrievers."""
    return tuple(_RETRIEVERS)


def find_retriever(name: str) -> Retriever:
    """A new retriever; KeyError for a name that `retriever_names` does not list (settings are checked before)."""
    return _RETRIEVERS[name]()


__all__ = ["Retriever", "find_retriever", "retriever_names"]
