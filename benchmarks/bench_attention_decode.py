"""Attention of one token over the cache: what an answer costs as the document grows.

All layers take their turn, so that keys and values come from memory, as in a model. Times are of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import attention_cases
from measuring import Row, make_parser, median_seconds, report, sweep_variants


def step(attention: attention_cases.Attention, token: attention_cases.Inputs, _: int) -> None:
    """One token through all layers."""
    for layer in range(attention.layers):
        attention.attend(layer, token)


def rows(given: Any) -> Iterator[Row]:
    pair_bytes = 2 * given.kv_heads * given.head_size
    for storage in given.storage or attention_cases.ELEMENT_BYTES:
        for tokens in given.tokens:
            attention = attention_cases.Attention(given, storage, tokens, given.layers)
            token = attention.inputs(1, tokens)
            for variant in sweep_variants(given.variant):
                seconds = median_seconds(partial(step, attention, token), given.seconds, after=attention.undo)
                moved = (tokens + 1) * pair_bytes * attention_cases.ELEMENT_BYTES[storage]
                case = {"cached": tokens, "storage": storage, "simd": variant}
                yield Row(case, seconds / given.layers, 4.0 * (tokens + 1) * given.heads * given.head_size, moved)
            attention.close()


def main() -> None:
    parser = make_parser("Attention while answering.")
    attention_cases.add_options(parser)
    parser.add_argument("--layers", type=int, default=24, help="that take turns (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="in the cache")
    given = parser.parse_args()
    report("satchel attention, decode", rows(given), given)


if __name__ == "__main__":
    main()
