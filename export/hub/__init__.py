"""Models by name: the registry, where fetched files lie, and fetching them."""

from .download import fetch
from .registry import DEFAULT_MODEL, ModelEntry, all_models, find

__all__ = ["DEFAULT_MODEL", "ModelEntry", "all_models", "fetch", "find"]
