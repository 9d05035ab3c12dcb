"""Operator sets: what a flavour of the graph writes for a linear layer, an embedding, attention and a gated unit."""

from __future__ import annotations

from .base import GraphParts, Operators
from .native import NativeOperators
from .portable import PortableOperators

__all__ = ["GraphParts", "NativeOperators", "Operators", "PortableOperators"]
