"""Is ``--memory`` held? Asks one question about a long document under several limits and shows the peak of each run.

    python benchmarks/memory_limit.py policy.txt --tokens 30000 --limits 600MB 700MB 1GB 2GB 4GB

Each run is a process of its own, started as a user would; its peak is what the operating system accounts to it
(resident pages, file-backed ones included). Exits with 1 when a run went over its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from satchel.devices.sizes import format_size, parse_size
from satchel.export.hub import DEFAULT_MODEL
from satchel.export.resolve import resolve_model
from satchel.runtime.documents import read_documents
from satchel.runtime.tokenizer import Tokenizer

QUESTION = "Who may upload a package without the maintainer's consent?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--limits", nargs="+", default=["600MB", "700MB", "1GB", "2GB", "4GB"])
    arguments = parser.parse_args()

    package = resolve_model(arguments.model)
    tokenizer = Tokenizer.open(package.folder, package.manifest.tokenizer)
    text = read_documents([arguments.document]).text
    with tempfile.TemporaryDirectory() as folder:
        cut = Path(folder) / "document.txt"
        cut.write_text(tokenizer.decode(tokenizer.encode(text)[: arguments.tokens]), encoding="utf-8")
        heads = f"{'limit':>10} {'peak':>10} {'share':>6} {'tokens':>7} {'hot':>7} {'read s':>7} {'tokens/s':>9}"
        print(heads, flush=True)
        held = [run(str(package.folder), cut, limit) for limit in arguments.limits]
    sys.exit(0 if all(held) else 1)


def run(package: str, document: Path, limit: str) -> bool:
    """One ``satchel ask`` under ``limit``; whether its peak stayed within."""
    command = [str(Path(sys.executable).with_name("satchel")), "ask", "-m", package, "--memory", limit,
               "--max-new-tokens", "40", "--json", str(document), QUESTION]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        output = process.stdout.read()
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        print(f"{limit:>10} {errors.strip()}", flush=True)
        return False
    answer = json.loads(output)
    peak_bytes = usage.ru_maxrss * 1024
    allowed = parse_size(limit)
    tokens, seconds = answer["prompt_tokens"], answer["read_seconds"]
    print(
        f"{limit:>10} {format_size(peak_bytes):>10} {peak_bytes / allowed:>6.0%} {tokens:>7,}"
        f" {answer['kv']['hot_tokens']:>7,} {seconds:>7.0f} {tokens / seconds:>9.0f}",
        flush=True,
    )
    return peak_bytes <= allowed


if __name__ == "__main__":
    main()
