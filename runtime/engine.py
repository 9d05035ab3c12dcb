"""One ONNX Runtime session over a package's graph: runs a chunk of tokens against a KV cache."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .. import kernels
from ..cache import FULL_MESSAGE, CacheFullError, CacheShape, KVCache
from ..errors import ModelError, SatchelError
from ..export.package import Package


class Cancelled(SatchelError):
    """A run was stopped by `Engine.cancel`; the cache is as it was before the run."""


class Engine:
    """Runs the graph. One run at a time; `cancel` may be called from another thread."""

    def __init__(self, package: Package, threads: int) -> None:
        self.package = package
        self.threads = threads
        spec = package.spec
        self.cache_shape = CacheShape(
            layers=spec.layers,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_size=spec.head_size,
            scale=spec.attention_scale,
            windows=spec.attention_windows if any(spec.attention_windows) else (),
        )
        self._lock = threading.Lock()
        self._running: tuple[KVCache, ort.RunOptions] | None = None
        try:
            self._session = ort.InferenceSession(
                str(package.model_file), session_options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises its own kinds, all of them about the file here
            raise ModelError(
                f"{package.model_file} cannot be loaded ({_line(error)}); export the model again"
            ) from error

    def run(self, ids: Sequence[int], cache: KVCache) -> NDArray[np.float32]:
        """Appends ``ids`` to the conversation in ``cache``; logits float32 [vocab] after the last one.

        Raises:
            Cancelled: `cancel` was called meanwhile. The cache is unchanged, as after every error.
            CacheFullError: the cache's byte limit is reached.
            ModelError: the graph failed.
        """
        count = len(ids)
        feeds = {
            "input_ids": np.asarray(ids, dtype=np.int64),
            "positions": np.arange(cache.total_tokens, cache.total_tokens + count, dtype=np.int64),
            "cache": np.array([cache.handle], dtype=np.int64),
        }
        options = ort.RunOptions()
        with self._lock:
            self._running = cache, options
            cache.rollback()  # of a run whose end an interrupt has cut off
            try:
                logits = self._session.run(["logits"], feeds, options)[0]
            except Exception as error:
                cache.rollback()
                if options.terminate:
                    raise Cancelled("the run was cancelled") from None
                if FULL_MESSAGE in str(error):
                    raise CacheFullError(_line(error)) from None
                raise ModelError(f"the model failed: {_line(error)}") from error
            except BaseException:
                cache.rollback()
                raise
            finally:
                self._running = None
        cache.commit(count)
        row: NDArray[np.float32] = logits[0]
        return row

    def cancel(self, cache: KVCache | None = None) -> None:
        """Stops the run that is under way, if there is one (and it is that of ``cache``), at the next operator."""
        running = self._running
        if running is not None and cache in (None, running[0]):
            running[1].terminate = True


def session_options(threads: int) -> ort.SessionOptions:
    """The settings of every session of ours: one pool of ``threads``, our operators, warnings left out."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.register_custom_ops_library(kernels.CUSTOM_OP_LIBRARY)
    return options


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
