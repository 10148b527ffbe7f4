"""Loads checkpoints of other formats than safetensors, under Hugging Face's names, without converting them first."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from npu_zoo.checkpoint import read_config
from npu_zoo.core.weights import Shard, WeightLoader
from npu_zoo.weights.formats.ascend_mp import read_ascend_mp
from npu_zoo.weights.formats.compressed import place_whole
from npu_zoo.weights.formats.hf import read_bin
from npu_zoo.weights.formats.mindspore import read_mindspore
from npu_zoo.weights.reading import Reader
from npu_zoo.weights.tensors import Source

if TYPE_CHECKING:
    from torch import Tensor


class SourceLoader(WeightLoader):
    """Whole tensors of a checkpoint, whatever its files hold of each."""

    tensors_last = True

    @abstractmethod
    def open(self, directory: Path) -> Source:
        """The checkpoint as a source."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`WeightLoader.shapes`."""
        return {p.name: p.shape for tensor in self._source.tensors.values() for p in place_whole(tensor)}

    def total_bytes(self) -> int:
        """See :meth:`WeightLoader.total_bytes`."""
        return sum(p.num_bytes for tensor in self._source.tensors.values() for p in place_whole(tensor))

    def tensors(
        self, shards: Mapping[str, Shard] | None = None, without: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """See :meth:`WeightLoader.tensors`; of a plain tensor that is shared by rows only those rows are read."""
        wanted = shards or {}
        with Reader() as reader:
            for name, tensor in self._source.tensors.items():
                if without and all(placement.name in without for placement in place_whole(tensor)):
                    continue
                shard = wanted.get(name)
                if shard is not None and shard.dim == 0 and self._source.row_multiple(name) == 1 and not tensor.scheme:
                    yield name, self._source.read(name, shard.start, shard.stop, reader).values
                    continue
                rows = self._source.read(name, 0, tensor.num_rows, reader)
                for placement in place_whole(tensor):
                    part, encoded = wanted.get(placement.name), placement.encode(rows)
                    yield placement.name, encoded if part is None else part.of(encoded)

    def files(self) -> list[Path]:
        """See :meth:`WeightLoader.files`."""
        return self._source.files()

    @functools.cached_property
    def _source(self) -> Source:
        return self.open(self.directory)


class BinLoader(SourceLoader):
    """``pytorch_model*.bin``; no code in them is executed."""

    def open(self, directory: Path) -> Source:
        """See :meth:`SourceLoader.open`."""
        return read_bin(directory, read_config(directory))


class MindSporeLoader(SourceLoader):
    """``*.ckpt``, one file or one for each rank."""

    def open(self, directory: Path) -> Source:
        """See :meth:`SourceLoader.open`."""
        return read_mindspore(directory, read_config(directory))


class AscendMpLoader(SourceLoader):
    """``model{i}-mp{N}.safetensors``."""

    def open(self, directory: Path) -> Source:
        """See :meth:`SourceLoader.open`."""
        return read_ascend_mp(directory, read_config(directory))
