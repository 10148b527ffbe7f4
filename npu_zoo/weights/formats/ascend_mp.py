"""``model{i}-mp{N}.safetensors``: a file for each of N ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.formats.compressed import quantization_of
from npu_zoo.weights.formats.files import file_pieces
from npu_zoo.weights.formats.hf import lay_out_safetensors
from npu_zoo.weights.formats.names import ASCEND_MP
from npu_zoo.weights.formats.ranked import RankedSource, TransposedTarget
from npu_zoo.weights.tensors import Placement, Segments, TargetOptions

_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


def read_ascend_mp(directory: Path, config: Mapping[str, Any]) -> RankedSource:
    """A directory of ranks' files.

    Raises:
        WeightsError: a rank's file is missing or damaged, or there are files of several conversions.
    """
    found = [match for path in directory.iterdir() if (match := _FILE.fullmatch(path.name))]
    counts = sorted({int(match[2]) for match in found})
    if len(counts) != 1:
        raise WeightsError(f"{directory} holds ranks' files of {counts or 'no'} mp sizes; one is due")
    missing = [n for n in range(counts[0]) if not (directory / rank_file(n, counts[0])).is_file()]
    if missing:
        raise WeightsError(f"{directory}: {rank_file(missing[0], counts[0])} is missing")
    ranks = [file_pieces(directory / rank_file(number, counts[0])) for number in range(counts[0])]
    scheme, _ = quantization_of(directory, config)
    return RankedSource(directory, ranks, ASCEND_MP, scheme)


def rank_file(rank: int, count: int) -> str:
    """A rank's file name."""
    return f"model{rank}-mp{count}.safetensors"


class AscendMpTarget(TransposedTarget):
    """Ranks' safetensors files."""

    def __init__(self, options: TargetOptions) -> None:
        count = options.num_ranks
        super().__init__(ASCEND_MP, count, lambda rank: rank_file(rank, count), options.num_experts)

    def lay_out(self, path: Path, placements: Iterable[Placement]) -> dict[str, Segments]:
        """See :meth:`Target.lay_out`."""
        return lay_out_safetensors(path, placements)
