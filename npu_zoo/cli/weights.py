"""``weights``: what a checkpoint directory holds, and whether it is as it was written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npu_zoo.cli.byte_progress import ByteProgress
from npu_zoo.cli.download_progress import size_text
from npu_zoo.cli.help import ZooCommand, ZooGroup, json_output
from npu_zoo.cli.options import JsonFlag
from npu_zoo.cli.output import count_text, note, print_fields, print_json, print_table
from npu_zoo.core.errors import HardwareError, WeightsError
from npu_zoo.selection import is_importable
from npu_zoo.weights.packed import PackedFile, list_packed, packed_folder, remove_abandoned, remove_packed

if TYPE_CHECKING:
    from npu_zoo.weights.tensors import Source

INSPECT_KEYS: dict[str, str] = {
    "directory": "The checkpoint's directory.",
    "format": "Its format.",
    "architecture": "The model class that config.json names.",
    "tensors": "Tensors of the model, whole, whatever the files hold of each.",
    "parameters": "Their values.",
    "bytes": "Bytes of all stored tensors.",
    "files": "Files that hold tensors.",
    "ranks": "Ranks that share the checkpoint.",
    "experts": "Routed experts of a layer; 0 where there are none.",
    "quantization": "How linear layers are quantized; null where they are not.",
    "group_size": "Input values that share a scale; null where a channel does.",
    "mtp_layers": "Layers beyond the model's own, which predict further tokens.",
    "dtypes": "By dtype: tensors and values; a quantized tensor counts under its scheme.",
    "manifest": "Whether the directory has a manifest that it can be verified by.",
}
"""What ``weights inspect --json`` writes."""

VERIFY_KEYS: dict[str, str] = {
    "directory": "The checkpoint's directory.",
    "tensors": "Stored tensors that were compared.",
    "bytes": "Their bytes.",
    "faults": "What differs from the manifest; empty where nothing does.",
}
"""What ``weights verify --json`` writes."""

PACKED_KEYS: dict[str, str] = {
    "folder": "Where files of packed weights lie.",
    "files": "Each of them.",
    "files[].path": "The file.",
    "files[].bytes": "Its size.",
    "files[].weights": "The checkpoint's directory; null where the file cannot be read.",
    "files[].exists": "Whether that is still there.",
    "files[].made_of": "The model, dtype, quantization and part of it; null where the file cannot be read.",
    "removed": "Whether they were removed.",
}
"""What ``weights packed --json`` writes."""

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint's directory.")]
group = typer.Typer(cls=ZooGroup, help="Look at checkpoints.", rich_markup_mode=None)


@group.command(cls=ZooCommand)
@json_output(INSPECT_KEYS)
def inspect(directory: Directory, as_json: JsonFlag = False) -> None:
    """Tell a checkpoint's format, dtypes, sizes, ranks and quantization, from headers alone."""
    found = _inspect(directory)
    if as_json:
        print_json(found)
        return
    scheme = found["quantization"] or "none"
    shown = {
        "directory": str(directory),
        "format": found["format"],
        "architecture": found["architecture"] or "not named",
        "size": f"{found['tensors']} tensors, {count_text(found['parameters'])} values, "
        f"{size_text(found['bytes'])} in {found['files']} files",
        "ranks": str(found["ranks"]),
        "quantization": scheme + (f", groups of {found['group_size']}" if found["group_size"] else ""),
    }
    if found["experts"]:
        shown["experts"] = str(found["experts"])
    if found["mtp_layers"]:
        shown["further tokens"] = f"{found['mtp_layers']} layers beyond the model's own predict them"
    shown["manifest"] = "yes; `npu-zoo weights verify` compares checksums" if found["manifest"] else "none"
    print_fields(shown)
    print()
    rows = [(name, str(entry["tensors"]), f"{entry['values']:,}") for name, entry in found["dtypes"].items()]
    print_table(("stored as", "tensors", "values"), rows)


@group.command(cls=ZooCommand)
@json_output(VERIFY_KEYS)
def verify(directory: Directory, as_json: JsonFlag = False) -> None:
    """Compare every tensor with the checksum in the manifest that `npu-zoo convert` wrote."""
    _need_torch()
    from npu_zoo.weights.manifest import verify as run

    with ByteProgress("compared") as progress:
        found = run(directory, progress)
    if as_json:
        print_json({"directory": str(directory), **{k: getattr(found, k) for k in ("tensors", "bytes", "faults")}})
    if found.faults:
        shown = "\n  ".join(found.faults[:20])
        more = f"\n  … and {len(found.faults) - 20} more" if len(found.faults) > 20 else ""
        raise WeightsError(f"{directory} is not as it was written:\n  {shown}{more}\nconvert or copy it again")
    if not as_json:
        print(f"{directory} is as it was written: {found.tensors} tensors, {size_text(found.bytes)}")


@group.command(cls=ZooCommand)
@json_output(PACKED_KEYS)
def packed(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Of this checkpoint alone.", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove them.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List weights that runs with --packed-weights keep have kept as kernels lay them out, or remove them.

    A run that takes them starts without laying weights out anew; one that finds them out of date does not take them.
    """
    due = str(directory.resolve()) if directory else None
    found = [file for file in list_packed() if due is None or (file.request and file.request.weights == due)]
    fields = [_packed_fields(file) for file in found]
    rows = [_packed_row(entry) for entry in fields]
    for file in found if remove else ():
        remove_packed(file)
    if remove:
        remove_abandoned()
    if as_json:
        print_json({"folder": str(packed_folder()), "files": fields, "removed": remove})
        return
    if not found:
        where = f" of {directory}" if directory else ""
        print(f"no packed weights{where} in {packed_folder()}; a run with --packed-weights keep writes some")
        return
    print_table(("weights", "of", "size", "file"), rows)
    if remove:
        note(f"removed {len(rows)} of them, {size_text(sum(file.bytes for file in found))}")


def _packed_fields(file: PackedFile) -> dict[str, Any]:
    shown: dict[str, Any] = {"path": str(file.path), "bytes": file.bytes, "weights": None, "exists": False}
    if file.request is None:
        return {**shown, "made_of": None}
    weights = file.request.weights
    return {**shown, "weights": weights, "exists": Path(weights).is_dir(), "made_of": json.loads(file.request.made_of)}


def _packed_row(fields: dict[str, Any]) -> tuple[str, ...]:
    size, name = size_text(fields["bytes"]), Path(fields["path"]).name
    made_of = fields["made_of"]
    if made_of is None:
        return "cannot be read", "", size, name
    shown = [made_of.get("dtype"), made_of.get("quantization"), "with MTP" if made_of.get("mtp") else None]
    if max(made_of.get("split", {}).values(), default=1) > 1:
        shown.append(f"part {'-'.join(map(str, made_of.get('part', [])))}")
    return fields["weights"] + ("" if fields["exists"] else " (gone)"), ", ".join(filter(None, shown)), size, name


def _need_torch() -> None:
    if not is_importable("torch"):
        raise HardwareError("this needs torch: pip install 'npu-zoo[run]'")


def _inspect(directory: Path) -> dict[str, Any]:
    _need_torch()
    from npu_zoo.weights.manifest import NAME
    from npu_zoo.weights.plan import mtp_layers, open_source

    spec, source, config = open_source(directory)
    schemes = {tensor.scheme for tensor in source.tensors.values() if tensor.scheme}
    scheme = next(iter(schemes), None)
    return {
        "directory": str(directory),
        "format": spec.name,
        "architecture": next(iter(config.get("architectures") or []), ""),
        "tensors": len(source.tensors),
        "parameters": sum(tensor.num_rows * tensor.row_values for tensor in source.tensors.values()),
        "bytes": sum(length for piece in _pieces(source) for _, length in piece.chunks),
        "files": len(source.files()),
        "ranks": source.num_ranks,
        "experts": int(config.get("n_routed_experts") or 0),
        "quantization": scheme.name if scheme else None,
        "group_size": scheme.group_size if scheme else None,
        "mtp_layers": len(mtp_layers(source, config)),
        "dtypes": _dtypes(source),
        "manifest": (directory / NAME).is_file(),
    }


def _pieces(source: Source) -> set[Any]:
    return {piece for name in source.tensors for piece in source.pieces(name)}


def _dtypes(source: Source) -> dict[str, dict[str, int]]:
    tensors: Counter[str] = Counter()
    values: Counter[str] = Counter()
    for name, tensor in source.tensors.items():
        kind = tensor.scheme.name if tensor.scheme else source.pieces(name)[0].dtype
        tensors[kind] += 1
        values[kind] += tensor.num_rows * tensor.row_values
    return {kind: {"tensors": count, "values": values[kind]} for kind, count in tensors.most_common()}
