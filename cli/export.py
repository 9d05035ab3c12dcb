"""``satchel export``: makes a model package ahead of a model's first use, or into a folder of one's own."""

from __future__ import annotations

from pathlib import Path

import click

from ..devices.sizes import format_size
from ..export.exporter import BITS, FLAVOURS, export_model
from ..export.resolve import find_source
from .progress import progress_bar

EPILOG = """\b
Examples:
  satchel export qwen2.5-coder-0.5b-instruct ./qwen-package
  satchel export model.gguf ./small-package --bits 4
  satchel export ./SmolLM2-360M-Instruct ./smollm-package
  satchel ask -m ./qwen-package report.pdf "What was decided?"
"""


@click.command("export", epilog=EPILOG, short_help="Turn a model into a package folder.")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    default="8",
    show_default=True,
    help="8 keeps what the file has, exactly where it is quantized already; 4 rounds the layers to 4 bits: "
    "smaller, less accurate.",
)
@click.option("--format", "form", type=click.Choice(["onnx"]), default="onnx", show_default=True)
@click.option(
    "--flavour",
    type=click.Choice(list(FLAVOURS)),
    default="native",
    show_default=True,
    help="native: for Satchel's own kernels on the CPU.",
)
def command(source: str, out: Path, bits: str, form: str, flavour: str) -> None:  # noqa: ARG001 (one form so far)
    """Export SOURCE into the package folder OUT and print its path.

    SOURCE is a .gguf file (of a split one the first part), a Hugging Face folder (config.json with safetensors), a
    name from 'satchel models', or a name on the Hugging Face hub (org/name). A model that is used by its name or path
    is exported by itself, once, into the cache folder: this command is for a package in a place of your choice. An
    older package in OUT is replaced, anything else there is left alone.
    """
    with progress_bar("bytes") as progress:
        file = find_source(source, progress=progress, notice=progress.notice)
        package = export_model(file, out, bits=int(bits), flavour=flavour, progress=progress)
        worst = max((matrix["rms_error"] for matrix in package.manifest.matrices), default=0.0)
        progress.notice(f"{format_size(package.weight_bytes)} of weights; largest error of a matrix: {worst:.2%}")
    click.echo(out)
