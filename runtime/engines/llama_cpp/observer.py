"""Watches llama.cpp's graph as it runs: which cells new tokens get, where the keys lie, and the last queries.

llama.cpp asks for each operator whether we want to see it (``cb_eval``); we want the write of a layer's keys and its
attention. What was seen of a run counts only after `commit`, as the run may be cancelled.

ggml's tensors are read through our copy of ``struct ggml_tensor``; it is compared with ggml's own accessors first.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

from ....errors import ModelError

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
CACHE_NAME = re.compile(rb"cache_k_l(\d+)")
ATTENTION = "FLASH_ATTN_EXT"
I64 = 27  # ggml's number of the type


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64), ("extra", ctypes.c_void_p),
    )  # fmt: skip


class Observer:
    """What the scorers of an engine need: one for each context. ``queries``: how many of the last ones are kept."""

    def __init__(self, layers: int, kv_heads: int, head_size: int, queries: int) -> None:
        self._layers, self._kv_heads, self._head_size, self.wanted = layers, kv_heads, head_size, queries
        self._ggml = _ggml()
        self._kinds: dict[int, str] = {}  # names of operators by their numbers, which differ from version to version
        self._indices_at = 0  # of the tensor with the cells of the run under way
        self._keys: dict[int, _Tensor] = {}  # a copy of each layer's, whose data stays where it is
        self._cells: Indices = np.empty(0, np.int64)
        self._queries: dict[int, Floats] = {}
        self.scale = 0.0
        self.failure: BaseException | None = None
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)

    def cells(self) -> Indices:
        """Of the tokens of the last batch, in their order."""
        return self._cells

    def queries(self) -> Floats:
        """float32 [L, W, H, D] after RoPE: the last ones of the last batch, at most as many as wanted."""
        return np.stack([self._queries[layer] for layer in range(self._layers)])

    def keys(self, layer: int, cells: Indices) -> Floats:
        """float32 [K, T, D] after RoPE, read from the cache."""
        tensor = self._keys[layer]
        size = tensor.nb[1] * tensor.ne[1]
        raw = np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_uint8)), shape=(size,))
        rows = np.ascontiguousarray(raw.reshape(tensor.ne[1], tensor.nb[1])[cells])
        plain: Floats = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.type)).astype(np.float32)
        heads: Floats = plain.reshape(len(cells), self._kv_heads, self._head_size).swapaxes(0, 1)
        return heads

    def _see(self, address: int, asking: bool, _data: object) -> bool:
        try:
            tensor = _Tensor.from_address(address)
            kind = self._kinds.get(tensor.op)
            if kind is None:
                kind = self._kinds[tensor.op] = self._ggml.ggml_op_name(tensor.op).decode()
            if kind == "SET_ROWS" and asking:
                self._note_cache(address, tensor)
            if kind != ATTENTION:
                return not asking
            layer = _layer_of(_Tensor.from_address(tensor.src[1]))
            if asking:
                return self.wanted > 0 or layer == 0
            self._note_attention(layer, tensor)
        except BaseException as error:  # it cannot pass through llama.cpp; the run is stopped, and tells
            self.failure = error
            return False
        return True

    def _note_cache(self, address: int, tensor: _Tensor) -> None:
        if not CACHE_NAME.match(tensor.name):
            return
        layer = _layer_of(tensor)
        if layer not in self._keys:
            self._check_layout(address, tensor)
            cache = _Tensor.from_address(tensor.view_src)
            if cache.ne[0] != self._kv_heads * self._head_size:
                raise ModelError("this llama.cpp keeps keys in another form than expected; use --policy recency")
            self._keys[layer] = _Tensor.from_buffer_copy(cache)
        if layer == 0:
            self._indices_at = tensor.src[1]

    def _note_attention(self, layer: int, tensor: _Tensor) -> None:
        if layer == 0:
            indices = _Tensor.from_address(self._indices_at)
            if indices.type != I64:
                raise ModelError("this llama.cpp names cells in another form than expected; use --policy recency")
            view = np.ctypeslib.as_array(
                ctypes.cast(indices.data, ctypes.POINTER(ctypes.c_int64)), shape=(indices.ne[0],)
            )
            self._cells = np.array(view)
        if self.wanted:
            self.scale = float(np.array(tensor.op_params[:1], np.int32).view(np.float32)[0])
            self._queries[layer] = _floats(_Tensor.from_address(tensor.src[0]))[:, -self.wanted :].swapaxes(0, 1).copy()

    def _check_layout(self, address: int, tensor: _Tensor) -> None:
        pointer = ctypes.c_void_p(address)
        if self._ggml.ggml_get_name(pointer) != tensor.name or self._ggml.ggml_get_data(pointer) != tensor.data:
            raise ModelError(
                f"llama-cpp-python {llama_cpp.__version__} has tensors in another layout than expected; use --policy "
                "recency"
            )


def _layer_of(cache: _Tensor) -> int:
    match = CACHE_NAME.match(cache.name)
    if match is None:
        raise ModelError("this llama.cpp does not name its cache as expected; use --policy recency")
    return int(match[1])


def _floats(tensor: _Tensor) -> Floats:
    """A tensor of floats of shape [D, T, H] in any strides, as [H, T, D]: a view."""
    size, tokens, heads = tensor.ne[0], tensor.ne[1], tensor.ne[2]
    last = (heads - 1) * tensor.nb[2] + (tokens - 1) * tensor.nb[1] + size * 4
    raw = np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_float)), shape=(last // 4,))
    return np.lib.stride_tricks.as_strided(raw, (heads, tokens, size), (tensor.nb[2], tensor.nb[1], 4))


def _ggml() -> Any:
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = sorted(path for path in folder.glob("*ggml-base*") if path.suffix in (".so", ".dylib", ".dll"))
    if not found:
        raise ModelError(f"{folder} has no ggml library to look into; use --policy recency")
    library = ctypes.CDLL(str(found[0]))
    for name, result, argument in (
        ("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p), ("ggml_get_data", ctypes.c_void_p, ctypes.c_void_p),
        ("ggml_op_name", ctypes.c_char_p, ctypes.c_int),
    ):  # fmt: skip
        function = getattr(library, name)
        function.restype, function.argtypes = result, [argument]
    return library
