"""The runtime: loading a model, reading documents in chunks, answering questions about them."""

from __future__ import annotations

from .context import Answer, Context, Usage
from .model import Model, load

__all__ = ["Answer", "Context", "Model", "Usage", "load"]
