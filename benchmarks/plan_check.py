"""Does a plan hold? Predicts bytes and seconds for a text, reads it, and shows both side by side.

    python benchmarks/plan_check.py qwen2.5-coder-0.5b-instruct policy.txt --context 16K --memory 650MB

The plan is that of ``satchel plan --measure`` in a process of its own, as its user sees it. Exits with 1 when a figure
is outside of its tolerance: 25 % for bytes (KV cache in memory and on disk, peak of the process), 50 % for seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from satchel.devices.machine import peak_rss_bytes
from satchel.devices.sizes import format_size, parse_tokens
from satchel.runtime import load
from satchel.runtime.documents import read_documents

BYTES_TOLERANCE, SECONDS_TOLERANCE = 0.25, 0.5
DECODE_TOKENS = 32
SMALL_BYTES = 4 << 20  # a difference of less is one of whole pages


@dataclass(frozen=True)
class Figure:
    """One figure of the plan and of the run."""

    name: str
    predicted: float
    found: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Within the tolerance, either way."""
        apart = abs(self.predicted - self.found)
        is_small = self.name.endswith("_bytes") and apart < SMALL_BYTES
        return is_small or apart <= self.tolerance * self.found

    def line(self) -> str:
        shown = [format_size(int(each)) if self.name.endswith("_bytes") else f"{each:,.2f}"
                 for each in (self.predicted, self.found)]  # fmt: skip
        ratio = f"{self.predicted / self.found:.2f}" if self.found else "-"
        return f"{self.name:<26} {shown[0]:>10} {shown[1]:>10} {ratio:>6}  {'ok' if self.holds else 'WRONG'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--context", default="8K", type=parse_tokens)
    parser.add_argument("--memory")
    parser.add_argument("--disk")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--kv", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    settings = dict(pair.split("=", 1) for pair in given.kv)
    options = {"memory": given.memory, "disk": given.disk, "policy": given.policy, "kv": settings,
               "threads": given.threads}  # fmt: skip
    planned = plan(given)
    figures = run(given.model, options, read_documents(given.text).text, given.context, planned)
    if given.json:
        rows = [{"name": each.name, "predicted": each.predicted, "found": each.found, "holds": each.holds}
                for each in figures]  # fmt: skip
        print(json.dumps({"placement": planned["placement"], "why": planned["why"], "figures": rows}))
    else:
        print(planned["why"])
        print(f"{'':<26} {'predicted':>10} {'found':>10} {'ratio':>6}")
        for figure in figures:
            print(figure.line())
    sys.exit(0 if all(figure.holds for figure in figures) else 1)


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """What ``satchel plan --json`` says for these options."""
    command = [sys.executable, "-m", "satchel", "plan", given.model, "--context", str(given.context), "--measure",
               "--json", "--policy", given.policy]  # fmt: skip
    for name in ("memory", "disk", "threads"):
        if (value := getattr(given, name)) is not None:
            command += [f"--{name}", str(value)]
    for pair in given.kv:
        command += ["--kv", pair]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def run(name: str, options: dict[str, object], text: str, tokens: int, planned: dict[str, Any]) -> list[Figure]:
    """Reads ``tokens`` tokens of ``text``, repeated where it is shorter, and decodes some more."""
    with load(name, **options) as model:  # type: ignore[arg-type]
        ids = model.tokenizer.encode(text)
        ids = (ids * (tokens // len(ids) + 1))[: tokens - DECODE_TOKENS]
        context = model.open_context(len(ids))
        begun = time.perf_counter()
        row = context.prefill(ids, lambda *_: None)
        read_seconds = time.perf_counter() - begun
        assert row is not None
        begun = time.perf_counter()
        for _ in range(DECODE_TOKENS):
            row = context.append([int(row.argmax())])
        rate = DECODE_TOKENS / (time.perf_counter() - begun)
        kv = context.kv
    predicted = planned["predicted"]
    in_ram = kv["hot_bytes"] + kv["warm_bytes"] + kv["digest_bytes"]
    return [
        Figure("kv_in_memory_bytes", planned["held_bytes"], in_ram, BYTES_TOLERANCE),
        Figure("kv_on_disk_bytes", planned["cold_bytes"], kv["cold_bytes"], BYTES_TOLERANCE),
        Figure("peak_bytes", planned["total_bytes"], peak_rss_bytes(), BYTES_TOLERANCE),
        Figure("read_seconds", predicted["read_seconds"], read_seconds, SECONDS_TOLERANCE),
        Figure("decode_tokens_per_second", predicted["decode_tokens_per_second"], rate, SECONDS_TOLERANCE),
    ]


if __name__ == "__main__":
    main()
