"""The files that a checkpoint directory is spread over: their names, their index, and where links may lead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.header import MAX_HEADER_BYTES


@dataclass(frozen=True)
class ShardNames:
    """How a format names its files.

    Attributes:
        single: the file that holds everything; taken where it exists.
        index: the JSON file whose ``weight_map`` maps tensors to files; taken where there is no single file.
        pattern: the glob pattern of the files, where there is neither.
    """

    single: str
    index: str
    pattern: str


def find_shards(directory: Path, names: ShardNames) -> tuple[list[Path], dict[str, str] | None]:
    """A checkpoint's files, and the weight map of its index where the files were found through one.

    Raises:
        WeightsError: a file is missing or a link out of the directory, or the index is damaged.
    """
    weight_map = _read_index(directory, names)
    found = _list_files(directory, names) if weight_map is None else sorted(set(weight_map.values()))
    return [shard_path(directory, name) for name in found], weight_map


def check_shards(
    directory: Path, names: ShardNames, weight_map: Mapping[str, str] | None, found: Mapping[Path, Iterable[str]]
) -> None:
    """Compare the tensors that each file was found to hold with one another and with the index.

    Raises:
        WeightsError: a tensor is in two files, or the index says otherwise; names tensors and files.
    """
    home: dict[str, Path] = {}
    for path, tensors in found.items():
        for tensor in tensors:
            if tensor in home:
                raise WeightsError(f"tensor {tensor} is in {home[tensor]} and again in {path}")
            home[tensor] = path
    if weight_map is not None:
        _compare_with_index(directory / names.index, weight_map, home)


def _list_files(directory: Path, names: ShardNames) -> list[str]:
    if (directory / names.single).exists():
        return [names.single]
    found = sorted(path.name for path in directory.glob(names.pattern))
    if not found:
        raise WeightsError(f"{directory} holds no {names.pattern} file")
    _refuse_gaps(directory, found, Path(names.pattern).suffix)
    return found


def _refuse_gaps(directory: Path, found: list[str], suffix: str) -> None:
    numbered = re.compile(rf"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+){re.escape(suffix)}")
    present = set(found)
    for match in filter(None, map(numbered.fullmatch, found)):
        stem, count, digits = match["stem"], int(match["count"]), len(match["number"])
        for number in range(1, min(count, 100_000) + 1):
            shard = f"{stem}-{number:0{digits}d}-of-{match['count']}{suffix}"
            if shard not in present:
                raise WeightsError(f"{directory}: shard {shard} is missing; download it again")


def _read_index(directory: Path, names: ShardNames) -> dict[str, str] | None:
    path = directory / names.index
    if (directory / names.single).exists() or not path.exists():
        return None
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise WeightsError(f"{path} has more than {MAX_HEADER_BYTES} bytes")
        weight_map = json.loads(path.read_bytes().decode("utf-8"))["weight_map"]
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: no index of a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{path}: weight_map does not map tensor names to file names")
    return weight_map


def shard_path(directory: Path, name: str) -> Path:
    """The shard's path, where it exists and its target lies in the directory (or in the Hub cache around it)."""
    path = directory / name
    try:
        target = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{directory}: shard {name!r} is missing; download it again") from error
    root = directory.resolve()
    homes = [root]
    if root.parent.name == "snapshots":  # the Hub's cache: snapshots/REVISION/FILE is a link to blobs/HASH
        homes.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise WeightsError(f"{directory}: shard {name!r} is a link out of the directory, to {target}; copy the file in")
    if not target.is_file():
        raise WeightsError(f"{directory}: shard {name!r} is not a file")
    return path


def _compare_with_index(index_path: Path, weight_map: Mapping[str, str], home: Mapping[str, Path]) -> None:
    directory = index_path.parent
    faults = [f"{name} is not in {shard}" for name, shard in weight_map.items() if home.get(name) != directory / shard]
    faults += [
        f"{name} is in {path.name} and not in the index" for name, path in home.items() if name not in weight_map
    ]
    if faults:
        more = f" … and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise WeightsError(f"{index_path} contradicts its shards: {'; '.join(faults[:20])}{more}")
