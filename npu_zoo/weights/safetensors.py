"""Reads safetensors checkpoints through memory maps, without a second copy in memory."""

from __future__ import annotations

import functools
import json
import mmap
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from npu_zoo.core.errors import WeightsError
from npu_zoo.core.weights import WeightLoader
from npu_zoo.weights.header import MAX_HEADER_BYTES, TensorEntry, read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


class SafetensorsLoader(WeightLoader):
    """A directory of one or more safetensors files.

    ``model.safetensors`` is taken where it exists, else the shards that ``model.safetensors.index.json`` names, else
    every ``*.safetensors`` file.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, read from headers alone.

        Raises:
            WeightsError: a file is missing, truncated or inconsistent; names file and tensor.
        """
        return {entry.name: entry.shape for entries in self._files.values() for entry in entries}

    def total_bytes(self) -> int:
        """The size of all tensors."""
        return sum(entry.stop - entry.start for entries in self._files.values() for entry in entries)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in file order, in the stored dtype, as a read-only view of the mapped file.

        A tensor is valid until the next one is asked for; its pages are dropped from memory then. Writing into it
        ends the process: consumers copy.
        """
        for path, entries in self._files.items():
            yield from _map_tensors(path, entries)

    @functools.cached_property
    def _files(self) -> dict[Path, tuple[TensorEntry, ...]]:
        index = _read_index(self.directory)
        if index is None:
            paths = _find_files(self.directory)
        else:
            paths = [_shard_path(self.directory, name) for name in sorted(set(index.values()))]
        files = {path: read_safetensors_header(path) for path in paths}
        _refuse_duplicates(files)
        if index is not None:
            _compare_with_index(self.directory / INDEX_FILE, index, files)
        return files


def _find_files(directory: Path) -> list[Path]:
    single = directory / SINGLE_FILE
    names = [SINGLE_FILE] if single.exists() else sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise WeightsError(f"{directory} holds no *.safetensors file")
    for match in filter(None, map(_SHARD.fullmatch, names)):
        stem, count, digits = match["stem"], int(match["count"]), len(match["number"])
        for number in range(1, min(count, 100_000) + 1):
            shard = f"{stem}-{number:0{digits}d}-of-{match['count']}.safetensors"
            if shard not in names:
                raise WeightsError(f"{directory}: shard {shard} is missing; download it again")
    return [_shard_path(directory, name) for name in names]


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_FILE
    if (directory / SINGLE_FILE).exists() or not path.exists():
        return None
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise WeightsError(f"{path} has more than {MAX_HEADER_BYTES} bytes")
        weight_map = json.loads(path.read_bytes().decode("utf-8"))["weight_map"]
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: no safetensors index: {type(error).__name__}: {error}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{path}: weight_map does not map tensor names to file names")
    return weight_map


def _shard_path(directory: Path, name: str) -> Path:
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


def _refuse_duplicates(files: dict[Path, tuple[TensorEntry, ...]]) -> None:
    home: dict[str, Path] = {}
    for path, entries in files.items():
        for entry in entries:
            if entry.name in home:
                raise WeightsError(f"tensor {entry.name} is in {home[entry.name]} and again in {path}")
            home[entry.name] = path


def _compare_with_index(index_path: Path, index: dict[str, str], files: dict[Path, tuple[TensorEntry, ...]]) -> None:
    directory = index_path.parent
    found = {entry.name: path for path, entries in files.items() for entry in entries}
    faults = [f"{name} is not in {shard}" for name, shard in index.items() if found.get(name) != directory / shard]
    faults += [f"{name} is in {path.name} and not in the index" for name, path in found.items() if name not in index]
    if faults:
        more = f" … and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise WeightsError(f"{index_path} contradicts its shards: {'; '.join(faults[:20])}{more}")


def _map_tensors(path: Path, entries: tuple[TensorEntry, ...]) -> Iterator[tuple[str, Tensor]]:
    size = entries[-1].stop if entries else 0
    if not size:
        return
    buffer = _map_file(path, size)
    dropped = 0
    for entry in entries:
        yield entry.name, _view(buffer, entry)
        consumed = entry.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if consumed > dropped and hasattr(mmap, "MADV_DONTNEED"):
            buffer.madvise(mmap.MADV_DONTNEED, dropped, consumed - dropped)
        dropped = consumed


def _map_file(path: Path, size: int) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be mapped: {error}") from error
    if len(buffer) != size:
        raise WeightsError(f"{path}: the file changed from {size} to {len(buffer)} bytes while it was being loaded")
    return buffer


def _view(buffer: mmap.mmap, entry: TensorEntry) -> Tensor:
    import torch

    dtype = getattr(torch, entry.dtype)
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        flat = torch.frombuffer(buffer, dtype=torch.uint8, count=entry.stop - entry.start, offset=entry.start)
    if flat.data_ptr() % entry.itemsize:  # the format does not promise alignment
        flat = flat.clone()
    return flat.view(dtype).view(entry.shape)
