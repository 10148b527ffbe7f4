"""Reads safetensors checkpoints through memory maps, without a second copy in memory."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from npu_zoo.core.errors import WeightsError
from npu_zoo.core.weights import Shard, WeightLoader
from npu_zoo.weights.header import TensorEntry, read_safetensors_header
from npu_zoo.weights.mapping import map_file, view_tensor
from npu_zoo.weights.shards import ShardNames, check_shards, find_shards

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DROPPED_AT_ONCE = 32 << 20
_NAMES = ShardNames(single=SINGLE_FILE, index=INDEX_FILE, pattern="*.safetensors")


class SafetensorsLoader(WeightLoader):
    """A directory of one or more safetensors files.

    ``model.safetensors`` is taken where it exists, else the shards that ``model.safetensors.index.json`` names, else
    every ``*.safetensors`` file.
    """

    tensors_last = True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, read from headers alone.

        Raises:
            WeightsError: a file is missing, truncated or inconsistent; names file and tensor.
        """
        return {entry.name: entry.shape for entries in self._files.values() for entry in entries}

    def total_bytes(self) -> int:
        """The size of all tensors."""
        return sum(entry.stop - entry.start for entries in self._files.values() for entry in entries)

    def files(self) -> list[Path]:
        """See :meth:`WeightLoader.files`."""
        return list(self._files)

    def tensors(
        self, shards: Mapping[str, Shard] | None = None, without: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in file order, in the stored dtype, as a read-only view of the mapped file.

        Pages of a tensor are dropped from memory some time after the next one was asked for, and are read anew where
        somebody looks at them later. Writing into it ends the process. Of a part only the pages that it lies in are
        read.
        """
        for path, entries in self._files.items():
            for name, tensor in _map_tensors(path, entries):
                if name in without:
                    continue
                shard = shards.get(name) if shards else None
                yield name, tensor if shard is None else shard.of(tensor)

    @functools.cached_property
    def _files(self) -> dict[Path, tuple[TensorEntry, ...]]:
        paths, weight_map = find_shards(self.directory, _NAMES)
        files = {path: read_safetensors_header(path) for path in paths}
        check_shards(self.directory, _NAMES, weight_map, {path: [e.name for e in files[path]] for path in paths})
        return files


def _map_tensors(path: Path, entries: tuple[TensorEntry, ...]) -> Iterator[tuple[str, Tensor]]:
    size = entries[-1].stop if entries else 0
    if not size:
        return
    buffer = map_file(path)
    if len(buffer) != size:
        raise WeightsError(f"{path}: the file changed from {size} to {len(buffer)} bytes while it was being loaded")
    dropped = before = 0
    for entry in entries:
        yield entry.name, view_tensor(buffer, entry)
        consumed = entry.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if consumed - dropped >= _DROPPED_AT_ONCE and hasattr(mmap, "MADV_DONTNEED"):
            # From before the last stretch on: a layer may have looked once more at what was dropped before it had all.
            buffer.madvise(mmap.MADV_DONTNEED, before, consumed - before)
            before, dropped = dropped, consumed
