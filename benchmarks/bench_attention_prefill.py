"""Attention of a chunk of tokens over what the cache holds and over itself: what reading costs beside the layers.

FLOP count what a causal mask leaves: each query and key pair that is visible, once for the logit and once for the
value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attention_cases
from measuring import Row, median_seconds, parse_options, report, sweep_variants


def rows(given: Any) -> Iterator[Row]:
    pair_bytes = 2 * given.kv_heads * given.head_size
    for storage in given.storage or attention_cases.ELEMENT_BYTES:
        for tokens in given.tokens:
            attention = attention_cases.Attention(given, storage, tokens, layers=1)
            chunk = attention.inputs(given.chunk, tokens)
            pairs = given.chunk * tokens + given.chunk * (given.chunk + 1) // 2
            for variant in sweep_variants(given.variant):
                seconds = median_seconds(
                    lambda _, a=attention, c=chunk: a.attend(0, c), given.seconds, after=attention.undo
                )
                moved = (tokens + given.chunk) * pair_bytes * attention_cases.ELEMENT_BYTES[storage]
                moved += 2 * 4 * given.chunk * given.heads * given.head_size  # queries and outputs, float32
                case = {"cached": tokens, "chunk": given.chunk, "storage": storage, "simd": variant}
                yield Row(case, seconds, 4.0 * pairs * given.heads * given.head_size, moved)
            attention.close()


def main() -> None:
    parser, parse = parse_options("Attention while reading.")
    attention_cases.add_options(parser)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 2048, 8192], help="in the cache before")
    given = parse()
    report("satchel attention, prefill", rows(given), given)


if __name__ == "__main__":
    main()
