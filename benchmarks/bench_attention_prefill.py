"""Attention of a chunk of tokens over what the cache holds and over itself: what reading costs besides layers.

FLOP count what a causal mask leaves: each visible pair of query and key, once for the logit and once for the
value.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import attention_cases
from measuring import Row, make_parser, median_seconds, report, sweep_variants


def read_chunk(attention: attention_cases.Attention, chunk: attention_cases.Inputs, _: int) -> None:
    attention.attend(0, chunk)


def rows(given: Any) -> Iterator[Row]:
    pair_bytes = 2 * given.kv_heads * given.head_size
    for storage in given.storage or attention_cases.ELEMENT_BYTES:
        for tokens in given.tokens:
            attention = attention_cases.Attention(given, storage, tokens, layers=1)
            chunk = attention.inputs(given.chunk, tokens)
            pairs = given.chunk * tokens + given.chunk * (given.chunk + 1) // 2
            for variant in sweep_variants(given.variant):
                seconds = median_seconds(partial(read_chunk, attention, chunk), given.seconds, after=attention.undo)
                moved = (tokens + given.chunk) * pair_bytes * attention_cases.ELEMENT_BYTES[storage]
                moved += 2 * 4 * given.chunk * given.heads * given.head_size  # queries and outputs, float32
                case = {"cached": tokens, "chunk": given.chunk, "storage": storage, "simd": variant}
                yield Row(case, seconds, 4.0 * pairs * given.heads * given.head_size, moved)
            attention.close()


def main() -> None:
    parser = make_parser("Attention while reading.")
    attention_cases.add_options(parser)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 2048, 8192], help="in the cache before")
    given = parser.parse_args()
    report("satchel attention, prefill", rows(given), given)


if __name__ == "__main__":
    main()
