"""What this plugin adds to the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npu_zoo_qwen3.int8_rows import SCHEME

group = typer.Typer(help="Tools for Qwen3's checkpoints.", no_args_is_help=True, rich_markup_mode=None)


@group.command()
def quantize(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A plain checkpoint; it is only read.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A directory that is empty or not there yet.")],
) -> None:
    """Quantize a checkpoint to int8 with a scale per output channel."""
    from npu_zoo_qwen3.weights import quantize_checkpoint

    count = quantize_checkpoint(source, target)
    typer.echo(f"{target}: {count} layers in {SCHEME}")
