"""The peer's side of a measurement: llama.cpp through llama-cpp-python, at its best sane settings.

Flash attention, batches of 512, keys and values of 16 bits unless asked otherwise, the file mapped, a context no longer
than needed. This file runs without our package (see ``worker.py``), so it imports nothing of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

BATCH = 512  # n_batch and n_ubatch
KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}
CONTEXT_STEP = 256  # llama.cpp rounds a context up to such a multiple


class LlamaCppEngine:
    """A loaded model with an empty context of at least ``tokens`` tokens; keys and values are of ``kv_type``."""

    def __init__(self, path: str, *, tokens: int, threads: int, kv_type: str = "f16") -> None:
        """Raises ValueError when the file cannot be loaded."""
        kind = KV_TYPES[kv_type]
        try:
            self._llama = llama_cpp.Llama(
                path,
                n_ctx=-(-tokens // CONTEXT_STEP) * CONTEXT_STEP,
                n_batch=BATCH,
                n_ubatch=BATCH,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=0,
                flash_attn=True,
                type_k=kind,
                type_v=kind,
                verbose=False,
            )
        except ValueError as error:
            raise ValueError(f"llama.cpp cannot load {path} ({error})") from error
        self._threads, self._kv_type = threads, kv_type
        self.vocab = int(self._llama.n_vocab())

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return int(self._llama.n_tokens)

    def reset(self) -> None:
        """Forgets what was read."""
        self._llama.reset()

    def close(self) -> None:
        """Frees the model and its context."""
        self._llama.close()

    def prefill(
        self, ids: Sequence[int], progress: Callable[[str, int, int], object]
    ) -> NDArray[np.float32]:
        """By the batch, as one call with all of them would do inside."""
        progress("reading", 0, len(ids))
        for first in range(0, len(ids), BATCH):
            self._llama.eval(ids[first : first + BATCH])
            progress("reading", min(first + BATCH, len(ids)), len(ids))
        return self._logits()

    def step(self, token: int) -> NDArray[np.float32]:
        self._llama.eval([token])
        return self._logits()

    def kv_bytes(self) -> int:
        """Of the cells in use: what llama.cpp would write to save this sequence.

        Its buffer has a few more, up to the next multiple of 256 tokens.
        """
        return int(llama_cpp.llama_state_seq_get_size(self._llama.ctx, 0))

    def settings(self) -> dict[str, Any]:
        cpu = llama_cpp.llama_print_system_info().decode()
        return {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "flash_attn": True,
            "n_batch": BATCH,
            "n_ubatch": BATCH,
            "kv_type": self._kv_type,
            "n_ctx": self._llama.n_ctx(),
            "n_threads": self._threads,
            "simd": [word.split("=")[0].strip() for word in cpu.split(":")[-1].split("|") if "= 1" in word],
        }

    def _logits(self) -> NDArray[np.float32]:
        row = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        found: NDArray[np.float32] = np.ctypeslib.as_array(
            ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), shape=(self.vocab,)
        )
        return found


def open_engine(job: dict[str, Any], notice: Callable[[str], object]) -> LlamaCppEngine:
    """Loads the GGUF file ``options.model`` with room for the job's tokens."""
    del notice
    path = job["options"]["model"]
    engine = LlamaCppEngine(path, tokens=len(job["ids"]) + job["decode_tokens"] + 1, threads=job["threads"])
    if max(job["ids"]) >= engine.vocab:
        raise ValueError(
            f"{path} has a vocabulary of {engine.vocab} tokens, too few for the ids of this model; "
            "give another file of the same model"
        )
    return engine
