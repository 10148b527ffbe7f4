"""Where a format keeps its tensors: the safetensors header, parsed without trust."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from npu_zoo.core.errors import WeightsError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

SAFETENSORS_DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
"""The header's dtype names: torch's name and the bytes of one element."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: torch's name of the stored dtype.
        start, stop: where its bytes lie, counted from the beginning of the file.
    """

    name: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    start: int
    stop: int


def read_safetensors_header(path: Path) -> tuple[TensorEntry, ...]:
    """The tensors of one file in the order of their offsets.

    Raises:
        WeightsError: the file cannot be read, or its header breaks the format; names file and tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise WeightsError(
                    f"{path}: no safetensors file, or a truncated one: its header would have {length} bytes; "
                    f"the file has {size}, and the limit is {MAX_HEADER_BYTES}"
                )
            raw = file.read(length)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_safetensors_header(raw, size - 8 - length, path)


def parse_safetensors_header(raw: bytes, data_bytes: int, path: Path) -> tuple[TensorEntry, ...]:
    """Check a header against the number of bytes that follow it; see :func:`read_safetensors_header`."""
    header = _parse_json(raw, path)
    _check_metadata(header.pop("__metadata__", None), path)
    base = 8 + len(raw)
    entries = [_entry(name, value, base, data_bytes, path) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = base
    for entry in entries:
        if entry.start != position:
            fault = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise WeightsError(
                f"{path}: tensor {entry.name} {fault}: it starts at byte {entry.start}, {position} was due"
            )
        position = entry.stop
    if position != base + data_bytes:
        raise WeightsError(f"{path}: {base + data_bytes - position} bytes after the last tensor belong to none")
    return tuple(entries)


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise WeightsError(f"{path}: the header names {twice!r} twice")
        return members

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    if raw[:1] != b"{":
        raise WeightsError(f"{path}: no safetensors file: its header does not begin with an opening brace")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path}: the header is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: the header is not JSON: {error}") from error
    return cast("dict[str, Any]", header)


def _check_metadata(metadata: Any, path: Path) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path}: the header's __metadata__ is no map of strings")


def _entry(name: str, value: Any, base: int, data_bytes: int, path: Path) -> TensorEntry:
    if not name.isprintable():
        raise WeightsError(f"{path}: the tensor name {_short(name)} holds characters that cannot be printed")
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: tensor {name}: its entry is no JSON object")
    kind, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(kind, str) or kind not in SAFETENSORS_DTYPES:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise WeightsError(f"{path}: tensor {name}: dtype {kind!r} is not known; known: {known}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)) or not _is_addressable(shape):
        raise WeightsError(f"{path}: tensor {name}: shape {_short(shape)} is no list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise WeightsError(f"{path}: tensor {name}: data_offsets {_short(offsets)} is no pair of offsets")
    start, stop = offsets
    if not start <= stop <= data_bytes:
        raise WeightsError(
            f"{path}: tensor {name}: bytes {start} to {stop} lie outside the {data_bytes} bytes of data; "
            "is the file truncated?"
        )
    dtype, itemsize = SAFETENSORS_DTYPES[kind]
    if math.prod(shape) * itemsize != stop - start:
        raise WeightsError(
            f"{path}: tensor {name}: {kind} of shape {_short(shape)} does not take the {stop - start} bytes it is given"
        )
    return TensorEntry(name, dtype, itemsize, tuple(shape), base + start, base + stop)


def _is_size(value: Any) -> bool:
    # Every size and offset of a real file fits in 63 bits, and what is larger makes the arithmetic slow.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_addressable(shape: list[int]) -> bool:
    # What torch can make a view of, empty dimensions counted as one.
    return len(shape) <= 64 and math.prod(max(size, 1) for size in shape) < 2**63


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
