"""Models by name: the registry, where fetched files lie, and fetching them."""

from .cache_folder import cache_folder
from .download import fetch
from .registry import DEFAULT_MODEL, ModelEntry, all_models, find

__all__ = ["DEFAULT_MODEL", "ModelEntry", "all_models", "cache_folder", "fetch", "find"]
