"""How far a model's next-token distributions are from float32 ``transformers`` on the dequantized GGUF file.

Run ``python benchmarks/parity.py MODEL.gguf [--text FILE]`` in an environment with the extra ``reference``
(torch, transformers, accelerate). Both sides see the same ids: windows spread over a natural text, each with a
prefix that is read at once and steps of one token after it, as in an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import satchel
from numpy.typing import NDArray
from satchel.runtime import Model

SAMPLES = Path(__file__).resolve().parents[1] / "docs" / "samples"
WINDOWS, PREFIX, STEPS = 4, 200, 25  # 100 positions
STORAGES = ("bf16", "fp32")

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """The distance of one storage setting: KL divergence of reference to ours, in nats."""

    model: str
    storage: str
    positions: int
    mean_kl: float
    largest_kl: float
    top1: float  # share of positions where both prefer the same token
    mean_perplexity_change: float  # of the text's own next tokens, relative


def windows_of(ids: Sequence[int], windows: int = WINDOWS, length: int = PREFIX + STEPS) -> list[list[int]]:
    """Windows of ``length`` ids spread evenly over ``ids``; ValueError when the text is too short."""
    if len(ids) < windows * length:
        raise ValueError(f"the text has {len(ids)} tokens, {windows} windows of {length} need more: give a longer one")
    step = (len(ids) - length) // max(windows - 1, 1)
    return [list(ids[first : first + length]) for first in range(0, windows * step, max(step, 1))][:windows]


def our_logits(model: Model, window: Sequence[int], prefix: int = PREFIX) -> Logits:
    """float32 [len(window) - prefix + 1, vocab]: after the prefix, and after each further id, full cache."""
    engine = model.engine
    cache = engine.new_cache(model.options.settings, hot_tokens=None)
    try:
        rows = [engine.run(window[:prefix], cache)]
        rows += [engine.run([index], cache) for index in window[prefix:]]
        return np.stack(rows)
    finally:
        cache.close()


class Reference:
    """The same model in float32, from the same file, by ``transformers`` on the CPU."""

    def __init__(self, gguf: Path) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        ).eval()

    def logits(self, window: Sequence[int], prefix: int = PREFIX) -> Logits:
        """As `our_logits`, in one forward pass."""
        with self._torch.inference_mode():
            rows = self._model(self._torch.tensor([list(window)])).logits[0, prefix - 1 :]
        found: Logits = rows.float().numpy().copy()
        return found


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    shifted: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(reference: Logits, ours: Logits) -> NDArray[np.float64]:
    """KL(reference || ours) in nats for each row."""
    expected, found = log_softmax(reference), log_softmax(ours)
    divergence: NDArray[np.float64] = (np.exp(expected) * (expected - found)).sum(axis=-1)
    return divergence


def compare(
    name: str, storage: str, windows: Sequence[Sequence[int]], reference: Sequence[Logits], ours: Sequence[Logits]
) -> Parity:
    """The figures over all positions but each window's last, which has no next token in the text."""
    expected = np.concatenate([rows[:-1] for rows in reference])
    found = np.concatenate([rows[:-1] for rows in ours])
    ends = [window[len(window) - len(rows) + 1 :] for window, rows in zip(windows, ours, strict=True)]
    following = np.concatenate(ends)
    divergence = kl_divergence(expected, found)
    at = np.arange(len(following))
    change = (log_softmax(expected) - log_softmax(found))[at, following].mean()
    return Parity(
        name, storage, len(expected), float(divergence.mean()), float(divergence.max()),
        float((expected.argmax(-1) == found.argmax(-1)).mean()), float(np.expm1(change)),
    )  # fmt: skip


def measure(
    gguf: Path, text: str, storages: Sequence[str] = STORAGES, *, cache_dir: Path | None = None
) -> list[Parity]:
    """The distance of the model in ``gguf`` over windows of ``text``, for each storage of the hot tier."""
    windows: list[list[int]] = []
    ours: dict[str, list[Logits]] = {}
    for storage in storages:
        with satchel.load(gguf, policy="full", kv={"storage": storage}, cache_dir=cache_dir) as model:
            windows = windows or windows_of(model.tokenizer.encode(text))
            ours[storage] = [our_logits(model, window) for window in windows]
    reference = Reference(gguf)
    expected = [reference.logits(window) for window in windows]
    return [compare(gguf.stem, storage, windows, expected, ours[storage]) for storage in storages]


def sample_text() -> Path:
    """The long document that the repository ships."""
    found = sorted(path for path in SAMPLES.glob("*") if path.suffix in (".md", ".txt"))
    if not found:
        raise SystemExit(f"{SAMPLES} has no .md or .txt; name a text with --text")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("gguf", type=Path, help="model file")
    parser.add_argument("--text", type=Path, help="a natural text (default: the sample in docs/samples)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args()
    text = (options.text or sample_text()).read_text(encoding="utf-8", errors="replace")
    begun = time.perf_counter()
    for row in measure(options.gguf, text):
        if options.json:
            print(json.dumps(asdict(row)))
            continue
        print(
            f"{row.model}, {row.storage} cache, {row.positions} positions: mean KL {row.mean_kl:.5f} nats "
            f"(largest {row.largest_kl:.4f}), top-1 {row.top1:.1%}, perplexity {row.mean_perplexity_change:+.2%}"
        )
    if not options.json:
        print(f"in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
