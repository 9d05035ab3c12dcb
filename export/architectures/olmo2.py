"""OLMo 2: norms after each sublayer only, and one norm over all heads' queries, one over all heads' keys."""

from __future__ import annotations

from dataclasses import replace

from ..sources import Source
from .base import DecoderModel, decoder, read_spec


def read(source: Source) -> DecoderModel:
    return decoder(source, replace(read_spec(source), norm_places="post", query_key_norm="whole"))
