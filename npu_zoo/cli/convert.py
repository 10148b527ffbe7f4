"""``convert``: from one checkpoint format to another, in another dtype, quantized, for another number of ranks."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npu_zoo.cli.byte_progress import ByteProgress
from npu_zoo.cli.download_progress import size_text
from npu_zoo.cli.help import json_output
from npu_zoo.cli.options import JsonFlag
from npu_zoo.cli.output import note, print_fields, print_json
from npu_zoo.core.errors import HardwareError, UsageError
from npu_zoo.dispatch import parse_bytes, parse_dtype
from npu_zoo.selection import is_importable

if TYPE_CHECKING:
    from npu_zoo.weights.convert import ConversionResult
    from npu_zoo.weights.plan import ConversionPlan

CONVERT_KEYS: dict[str, str] = {
    "source": "The directory that was read.",
    "source_format": "Its format.",
    "destination": "The directory that was written.",
    "format": "Its format.",
    "options": "What was asked for.",
    "tensors": "Tensors of the model in the result.",
    "bytes": "Their bytes as stored.",
    "resumed": "Tensors that an earlier run had written; null after a dry run.",
    "dropped": "Tensors that were left out.",
    "files": "The files that hold tensors.",
}
"""What ``convert --json`` writes."""


class Mtp(str, enum.Enum):
    """What becomes of layers that predict further tokens."""

    keep = "keep"
    drop = "drop"


def _option(help_text: str, flag: str, metavar: str) -> Any:
    return typer.Option(flag, help=help_text, metavar=metavar)


@json_output(CONVERT_KEYS)
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint's directory; it is only read.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A directory that does not exist yet.")],
    to: Annotated[str, _option("hf-safetensors, hf-bin, mindspore-ckpt or ascend-mp.", "--to", "FORMAT")],
    dtype: Annotated[str | None, _option("bfloat16, float16 or float32. Default: as it is.", "--dtype", "NAME")] = None,
    quantize: Annotated[str | None, _option("w8a16, w4a16 or w8a8.", "--quantize", "SCHEME")] = None,
    group_size: Annotated[
        int | None, _option("Input values that share a scale. Default: a scale per channel.", "--group-size", "N")
    ] = None,
    tp: Annotated[int | None, _option("Ranks that share the result.", "--tp", "N")] = None,
    ep: Annotated[int | None, _option("Ranks that share its experts; the same.", "--ep", "N")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Put ranks' files together into one.")] = False,
    mtp: Annotated[Mtp, _option("keep or drop layers that predict further tokens.", "--mtp", "keep|drop")] = Mtp.keep,
    shard_size: Annotated[str, _option("Bytes of a file. Default: 5GB.", "--shard-size", "SIZE")] = "5GB",
    threads: Annotated[int | None, _option("Default: one for each processor.", "--threads", "N")] = None,
    include_code: Annotated[bool, typer.Option("--include-code", help="Take Python files along.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Convert a checkpoint: format, dtype, quantization, number of ranks.

    Works in bounded memory, whatever the checkpoint's size. An interrupted conversion goes on where it was when the
    same command is given again. Nothing lies under DST before everything is written; `npu-zoo weights verify DST`
    compares checksums later.
    """
    if not is_importable("torch"):
        raise HardwareError("convert needs torch: pip install 'npu-zoo[run]'")
    from npu_zoo.weights.convert import convert as run
    from npu_zoo.weights.plan import ConvertOptions, plan_conversion
    from npu_zoo.weights.quantize import Scheme

    if group_size is not None and (quantize is None or group_size < 1):
        raise UsageError(f"--group-size {group_size} goes with --quantize w8a16 or w4a16, and is 1 at least")
    options = ConvertOptions(
        to=to,
        dtype=parse_dtype(dtype) if dtype else None,
        scheme=Scheme.of(quantize, group_size) if quantize else None,
        tp=_ranks(tp, merge=merge),
        ep=ep,
        mtp="drop" if mtp is Mtp.drop else "keep",
        shard_size=parse_bytes(shard_size, "--shard-size") or 0,
        include_code=include_code,
    )
    plan = plan_conversion(source, options)
    if not as_json:
        _show(plan, destination)
    result = None
    if not dry_run:
        with ByteProgress("written") as progress:
            result = run(plan, destination, progress, threads)
    if as_json:
        print_json(_data(plan, destination, result))
    elif result:
        print(f"{destination} is complete")


def _ranks(tp: int | None, *, merge: bool) -> int:
    if tp is not None and tp < 1:
        raise UsageError(f"--tp {tp}: there is 1 rank at least")
    if merge and tp not in (None, 1):
        raise UsageError(f"--merge makes one file of all ranks', and --tp {tp} asks for several; leave one of both out")
    return tp or 1


def _show(plan: ConversionPlan, destination: Path) -> None:
    options = plan.options
    what = [options.dtype or "dtypes as they are"]
    if options.scheme:
        by = f"groups of {options.scheme.group_size}" if options.scheme.group_size else "output channel"
        what.append(f"{options.scheme.name}, a scale per {by}")
    print_fields(
        {
            "from": f"{plan.directory} ({plan.source_format})",
            "to": f"{destination} ({options.to}" + (f", {options.tp} ranks)" if options.tp > 1 else ")"),
            "as": "; ".join(what),
            "size": f"{len(plan.placed)} tensors, {size_text(plan.num_bytes)}",
        }
    )
    if plan.dropped:
        note(f"{len(plan.dropped)} tensors of layers that predict further tokens are left out")
    sys.stdout.flush()


def _data(plan: ConversionPlan, destination: Path, result: ConversionResult | None) -> dict[str, Any]:
    import dataclasses

    return {
        "source": str(plan.directory),
        "source_format": plan.source_format,
        "destination": str(destination),
        "format": plan.options.to,
        "options": dataclasses.asdict(plan.options),
        "tensors": len(plan.placed),
        "bytes": plan.num_bytes,
        "resumed": result.resumed if result else None,
        "dropped": list(plan.dropped),
        "files": sorted({placement.file for placements in plan.placed.values() for placement in placements}),
    }
