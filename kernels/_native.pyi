from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

PAGE_TOKENS: int
ENTROPY_BLOCK_BYTES: int
ENTROPY_MAX_RATIO: int

def variants() -> list[str]: ...
def active_variant() -> str: ...
def select_variant(name: str) -> None: ...
def entropy_encode(data: Buffer | NDArray[Any], *, planes: int, threads: int = 1) -> bytes: ...
def entropy_decode(
    coded: Buffer | NDArray[Any], original_bytes: int, *, planes: int, threads: int = 1
) -> NDArray[np.uint8]: ...
def linear(
    x: NDArray[np.float32],
    packed: NDArray[np.uint8],
    outputs: int,
    bits: int,
    block: int,
    has_min: bool,
    multiplier: float,
    bias: NDArray[np.float32] | None = None,
    threads: int = 1,
) -> NDArray[np.float32]: ...
def embed(
    ids: NDArray[np.int64],
    packed: NDArray[np.uint8],
    outputs: int,
    inputs: int,
    bits: int,
    block: int,
    has_min: bool,
    multiplier: float,
) -> NDArray[np.float32]: ...
def swiglu(gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]: ...

class KVCache:
    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        storage: Literal["fp32", "bf16"] | str = "fp32",
        threads: int = 1,
        observed_queries: int = 0,
        limit_bytes: int = 0,
    ) -> None: ...
    @property
    def handle(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def bytes(self) -> int: ...
    @property
    def pool_bytes(self) -> int: ...
    @property
    def pool_peak_bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def close(self) -> None: ...
    def fork(self) -> KVCache: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def forget_from(self, position: int) -> None: ...
    def clear(self) -> None: ...
    def tokens(self, layer: int, kv_head: int) -> int: ...
    def retain(self, layer: int, kv_head: int, kept: NDArray[np.int32]) -> None: ...
    def retain_layer(self, layer: int, kept: NDArray[np.int32]) -> None: ...
    def positions(self, layer: int, kv_head: int) -> NDArray[np.int32]: ...
    def read(
        self, layer: int, kv_head: int, rotated: bool = True
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]: ...
    def observed(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]: ...
    def attend(
        self,
        layer: int,
        q: NDArray[np.float32],
        k: NDArray[np.float32],
        v: NDArray[np.float32],
        positions: NDArray[np.int64],
        frequencies: NDArray[np.float32],
        *,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
        attention_factor: float = 1.0,
        threads: int = 1,
    ) -> NDArray[np.float32]: ...
