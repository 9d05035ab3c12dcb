"""Measuring our runtime, alone or beside another one, with the same tokens, threads and timing code.

``run.py`` is the entrance; ``compare.py`` alternates the sides; ``worker.py`` is the process that measures;
``satchel_engine.py`` and ``llama_cpp_engine.py`` are the sides. A further peer is one more engine file.
"""

from __future__ import annotations

from .compare import RATIOS, Figures, Report
from .run import DECODE_TOKENS, DEFAULT_RUNS, Contest, named_file, prepare

__all__ = ["DECODE_TOKENS", "DEFAULT_RUNS", "RATIOS", "Contest", "Figures", "Report", "named_file", "prepare"]
