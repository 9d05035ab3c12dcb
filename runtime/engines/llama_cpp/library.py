"""llama.cpp's C interface as we use it: a model, and contexts over it. Nothing here knows of conversations or plans.

llama.cpp ends the process on some wrong arguments (its assertions), so what is passed on is checked by the callers.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from ....errors import ModelError
from .observer import Observer

VERSION = str(llama_cpp.__version__)
BATCH = 512  # tokens that pass the graph together, at most
CELL_STEP = 256  # llama.cpp rounds contexts up to such a multiple
SEQUENCES = 16  # conversations at once: each costs a row of logits
KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}
OUTPUTS = SEQUENCES  # rows of logits that a batch may ask for; llama.cpp wants one for each sequence
ERROR_LEVEL = 4

_said: deque[tuple[int, str]] = deque(maxlen=400)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _listen(level: int, text: bytes, _data: object) -> None:
    _said.append((level, text.decode("utf-8", "replace").strip()))


def complaint() -> str:
    """What llama.cpp said first of what went wrong in the last call, on one line: what follows says less."""
    found = [text for level, text in _said if level == ERROR_LEVEL and text]
    return " ".join(found[0].split())[:200] if found else "no reason given"


def buffer_bytes(kind: str) -> int:
    """Bytes of the ``compute`` or ``output`` buffers, as llama.cpp reported them for the last context; 0: unknown."""
    pattern = re.compile(rf"{kind} buffer size\s*=\s*([0-9.]+) MiB")
    found = [float(match[1]) for _, text in _said if (match := pattern.search(text))]
    return int(sum(found) * (1 << 20))


def stop_function() -> Any:
    """A C function that says whether the text at its argument is not empty: with it, a run is stopped by writing one
    byte, and no Python code runs between a graph's hundreds of operators.
    """
    libc = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    return ctypes.cast(libc.strlen, llama_cpp.ggml_abort_callback)


class LoadedModel:
    """A .gguf file that is mapped. Raises ModelError when llama.cpp cannot load it."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(_listen, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        _said.clear()
        self.pointer = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise ModelError(f"llama.cpp cannot load {path} ({complaint()}); use another model or --engine native")
        self.vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.pointer)))

    def close(self) -> None:
        if self.pointer:
            llama_cpp.llama_model_free(self.pointer)
        self.pointer = None


class LlamaContext:
    """Cells for keys and values, shared by all sequences, and the graph over them.

    Raises MemoryError when llama.cpp cannot make it.
    """

    def __init__(
        self, model: LoadedModel, *, cells: int, storage: str, threads: int, observer: Observer | None = None
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-cells // CELL_STEP) * CELL_STEP
        params.n_batch = params.n_ubatch = min(BATCH, params.n_ctx)
        params.n_seq_max, params.n_outputs_max = SEQUENCES, OUTPUTS
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = KV_TYPES[storage]
        params.kv_unified = True  # forks share cells
        params.swa_full = True  # or windowed layers could not go back to an earlier token
        params.no_perf = True
        self._observer = observer
        if observer is not None:
            params.cb_eval = observer.callback
        _said.clear()
        self.cells, self.storage, self.observing = int(params.n_ctx), storage, observer is not None
        self._pointer = llama_cpp.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise MemoryError(complaint())
        self._memory = llama_cpp.llama_get_memory(self._pointer)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._vocab = model.vocab
        self._stop = ctypes.create_string_buffer(2)
        self._stop_function = stop_function()  # kept: llama.cpp calls it
        llama_cpp.llama_set_abort_callback(
            self._pointer, self._stop_function, ctypes.cast(self._stop, ctypes.c_void_p)
        )

    def close(self) -> None:
        if self._pointer:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._pointer)
        self._pointer = None

    def stop(self) -> None:
        """Ends the `decode` that is under way, from any thread."""
        self._stop[0] = b"\x01"

    def go_on(self) -> None:
        """Takes back an earlier `stop`."""
        self._stop[0] = b"\x00"

    @property
    def stopped(self) -> bool:
        return bool(self._stop[0] != b"\x00")

    def decode(self, ids: Sequence[int], first: int, sequence: int, *, wants_logits: bool) -> int:
        """Appends up to `BATCH` tokens at the positions from ``first`` on. llama.cpp's code: 0 is done, 1 no room."""
        batch, count = self._batch, len(ids)
        assert 0 < count <= BATCH
        batch.n_tokens = count
        _said.clear()
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = first + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wants_logits and index == count - 1
        return int(llama_cpp.llama_decode(self._pointer, batch))

    def logits(self) -> NDArray[np.float32]:
        """float32 [vocab] of the last token that wanted them: a copy."""
        row = llama_cpp.llama_get_logits_ith(self._pointer, -1)
        view = np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), shape=(self._vocab,))
        return np.array(view, dtype=np.float32)

    def forget(self, sequence: int, first: int, end: int = -1) -> None:
        """Removes the positions from ``first`` up to ``end`` (-1: all later ones)."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, first, end)

    def clear(self) -> None:
        """Forgets everything: the next tokens get the cells from 0 on, in their order."""
        llama_cpp.llama_memory_clear(self._memory, False)

    def copy(self, source: int, target: int) -> None:
        """``target`` gets the cells of ``source``; nothing is copied but marks."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def last_position(self, sequence: int) -> int:
        """-1 for a sequence without tokens."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, sequence))

    def state_bytes(self, sequence: int) -> int:
        return int(llama_cpp.llama_state_seq_get_size(self._pointer, sequence))

    def save(self, path: Path, sequence: int | None = None) -> bool:
        """Writes the state of one sequence, or of all, tensor by tensor: no copy in memory. Whether it worked."""
        name, none = str(path).encode(), (llama_cpp.llama_token * 1)()
        if sequence is None:
            return bool(llama_cpp.llama_state_save_file(self._pointer, name, none, 0))
        return bool(llama_cpp.llama_state_seq_save_file(self._pointer, name, sequence, none, 0))

    def load(self, path: Path, sequence: int | None = None) -> bool:
        """Reads what `save` wrote. Whether it worked."""
        name, none, count = str(path).encode(), (llama_cpp.llama_token * 1)(), ctypes.c_size_t(0)
        _said.clear()
        if sequence is None:
            return bool(llama_cpp.llama_state_load_file(self._pointer, name, none, 1, ctypes.byref(count)))
        return bool(llama_cpp.llama_state_seq_load_file(self._pointer, name, sequence, none, 1, ctypes.byref(count)))
