"""The tiered KV cache: what a conversation remembers, and how it stays inside its budget.

Hot tier only so far: pages of floats in RAM, pruned by a scorer between chunks. ``kv_cache.py`` is the entrance.
"""

from __future__ import annotations

from .kv_cache import CacheFullError, CacheShape, KVCache, KVUsage
from .settings import CacheSettings

__all__ = ["CacheFullError", "CacheSettings", "CacheShape", "KVCache", "KVUsage"]
