"""MindSpore's checkpoints: one .ckpt file, or a directory ``rank_x`` for each rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.formats.files import file_pieces
from npu_zoo.weights.formats.names import MINDSPORE
from npu_zoo.weights.formats.ranked import RankedSource, RankedTarget
from npu_zoo.weights.mindspore import CheckpointWriter
from npu_zoo.weights.tensors import Placement, Segments, TargetOptions

_RANK = re.compile(r"rank_(\d+)")


def read_mindspore(directory: Path, config: Mapping[str, Any]) -> RankedSource:
    """A directory with one .ckpt file, or with ``rank_0`` to ``rank_N`` that have one each.

    Raises:
        WeightsError: a rank or a file is missing or damaged, or there are several files where one is due.
    """
    numbered = {int(m[1]): path for path in directory.iterdir() if path.is_dir() and (m := _RANK.fullmatch(path.name))}
    if numbered and sorted(numbered) != list(range(len(numbered))):
        missing = next(n for n in range(max(numbered)) if n not in numbered)
        raise WeightsError(f"{directory}: rank_{missing} is missing")
    folders = [numbered[number] for number in sorted(numbered)] or [directory]
    return RankedSource(directory, [file_pieces(_only_file(folder)) for folder in folders], MINDSPORE)


def _only_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.ckpt"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:4]) or "none"
        raise WeightsError(f"{folder} holds {len(found)} .ckpt files ({names}); one is due")
    return found[0]


class MindSporeTarget(RankedTarget):
    """One .ckpt file, or one for each rank in a directory of its own."""

    def __init__(self, options: TargetOptions) -> None:
        single = options.num_ranks == 1

        def file(rank: int) -> str:
            return "checkpoint.ckpt" if single else f"rank_{rank}/checkpoint_{rank}.ckpt"

        super().__init__(MINDSPORE, options.num_ranks, file)

    def lay_out(self, path: Path, placements: Iterable[Placement]) -> dict[str, Segments]:
        """See :meth:`Target.lay_out`."""
        with path.open("wb") as file:
            writer = CheckpointWriter(file)
            found = {p.name: writer.reserve(p.name, p.dtype, p.shape) for p in sorted(placements, key=lambda p: p.name)}
            writer.finish()
            file.truncate(file.tell())
        return found
