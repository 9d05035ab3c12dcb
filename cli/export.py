"""``satchel export``: makes a model package ahead of its first use, or a GGUF file for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import click

from ..cache.settings import ALL_STORAGES, CacheSettings
from ..devices.sizes import format_size
from ..errors import OptionError
from ..export.exporter import BITS, FLAVOURS, export_model
from ..export.gguf_writer import export_gguf
from ..export.resolve import find_source
from .options import key_values
from .progress import ProgressBar, progress_bar

EPILOG = """\b
Examples:
  satchel export qwen2.5-coder-0.5b-instruct ./qwen-package
  satchel export model.gguf ./small-package --bits 4
  satchel export ./SmolLM2-360M-Instruct ./smollm-package
  satchel ask -m ./qwen-package report.pdf "What was decided?"
  satchel export ./SmolLM2-360M-Instruct smollm.gguf
  satchel export org/name small.gguf --bits 4 --kv window=512 --kv budget_bytes=64MB
"""


@click.command("export", epilog=EPILOG, short_help="Turn a model into a package folder, or a GGUF file.")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    default="8",
    show_default=True,
    help="8 keeps what the file has, exactly where it is quantized already; 4 rounds the layers to 4 bits: "
    "smaller, less accurate. In GGUF files that is Q8_0 and, at 4, Q4_0 for the layers' matrices with Q8_0 for "
    "embedding and output; norms stay floats.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", "gguf"]),
    help="onnx: a package folder for Satchel; gguf: one file for llama.cpp, which Satchel reads, too.  [default: as "
    "OUT ends: .gguf or anything else]",
)
@click.option(
    "--flavour",
    type=click.Choice(list(FLAVOURS)),
    default="native",
    show_default=True,
    help="native: for Satchel's own kernels on the CPU; portable: stock ONNX Runtime operators, for any device "
    "(cuda, dml, coreml; not run on a GPU yet).",
)
@click.option(
    "--kv",
    metavar="KEY=VALUE",
    multiple=True,
    callback=key_values,
    help="With --format gguf: a setting of the KV cache (as of 'satchel ask') that is kept in the file as "
    "satchel.kv.KEY, repeatable.",
)
@click.pass_context
def command(
    ctx: click.Context, source: str, out: Path, bits: str, form: str | None, flavour: str, kv: dict[str, str]
) -> None:
    """Export SOURCE into the package folder OUT, or into the GGUF file OUT, and print its path.

    SOURCE is a .gguf file (of a split one the first part), a Hugging Face folder (config.json with safetensors,
    or with the ONNX graph that Optimum exported), a name from 'satchel models', or a name on the Hugging Face hub
    (org/name). A model that is used by its name or path is exported by itself, once, into the cache folder: this
    command is for a package in a place of your choice, or for llama.cpp. An older package or .gguf file in OUT is
    replaced, anything else there is left alone.
    """
    form = form or ("gguf" if out.suffix == ".gguf" else "onnx")
    settings = _settings(ctx, out, form, kv)
    with progress_bar("bytes") as progress:
        file = find_source(source, progress=progress, notice=progress.notice)
        if form == "gguf":
            _export_gguf(file, out, int(bits), settings, progress)
        else:
            package = export_model(file, out, bits=int(bits), flavour=flavour, progress=progress)
            worst = max((matrix["rms_error"] for matrix in package.manifest.matrices), default=0.0)
            progress.notice(f"{format_size(package.weight_bytes)} of weights; largest error of a matrix: {worst:.2%}")
    click.echo(out)


def _settings(ctx: click.Context, out: Path, form: str, kv: dict[str, str]) -> dict[str, int | str]:
    """The checked settings that were given. Raises click.UsageError for what does not go together."""
    if form != "gguf" and kv:
        raise click.UsageError("--kv is for --format gguf; a package takes such settings when it is used", ctx)
    if form == "gguf" and ctx.get_parameter_source("flavour") != click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--flavour is for --format onnx", ctx)
    if form == "gguf" and out.suffix != ".gguf":  # before anything is fetched
        raise click.UsageError(f"{out} does not end in .gguf; name the file {out.name or 'model'}.gguf", ctx)
    try:
        settings = CacheSettings.parse(kv, storages=ALL_STORAGES)
    except OptionError as error:
        raise click.UsageError(str(error), ctx) from error
    return {key: getattr(settings, key) for key in kv}


def _export_gguf(file: Path, out: Path, bits: int, settings: dict[str, int | str], progress: ProgressBar) -> None:
    written = export_gguf(file, out, bits=bits, kv=settings, progress=progress, notice=progress.notice)
    progress.notice(
        f"{format_size(written.bytes)}; {written.carried} tensors as they were, {written.rounded} quantized"
    )
