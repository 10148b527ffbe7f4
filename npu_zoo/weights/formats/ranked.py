"""Checkpoints of several ranks: each tensor whole, replicated, or shared along one dimension."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.formats.names import NameMap, TensorName
from npu_zoo.weights.quantize import Scheme, check_width
from npu_zoo.weights.reading import Piece, Reader
from npu_zoo.weights.tensors import Digests, LogicalTensor, Placement, Rows, Source, Target

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHT, _SCALE = ".weight", ".scale"
_INT4_PER_WORD = 8


class RankedSource(Source):
    """The tensors of all ranks, put together.

    Args:
        directory: for messages.
        ranks: each rank's stored tensors by name.
        names: the format's names.
        scheme: of tensors that have a scale beside them; where None it follows from their dtype.

    Raises:
        WeightsError: a name is none of the format's, or ranks contradict each other.
    """

    def __init__(
        self, directory: Path, ranks: Sequence[Mapping[str, Piece]], names: NameMap, scheme: Scheme | None = None
    ) -> None:
        self.directory = directory
        self._ranks, self._names, self._scheme = ranks, names, scheme
        self.num_ranks = len(ranks)
        self._parts: dict[str, tuple[Piece, ...]] = {}
        self._scales: dict[str, tuple[Piece, ...]] = {}
        self._split: dict[str, int | None] = {}
        self.tensors = {}
        for stored in dict.fromkeys(name for rank in ranks for name in rank):
            if not stored.endswith(_SCALE):
                self._add(stored)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """See :meth:`Source.pieces`."""
        return self._parts[name] + self._scales.get(name, ())

    def row_multiple(self, name: str) -> int:
        """See :meth:`Source.row_multiple`; quantized matrices are stored transposed and read at once."""
        return self.tensors[name].num_rows if name in self._scales else 1

    def read(self, name: str, start: int, stop: int, reader: Reader, digests: Digests | None = None) -> Rows:
        """See :meth:`Source.read`."""
        of = {} if digests is None else digests
        if name in self._scales:
            return self._read_quantized(name, reader, of)
        parts, split = self._parts[name], self._split[name]
        if split == 0 and len(parts) > 1:
            return Rows(_join(list(_stretches(parts, start, stop, reader, of)), 0))
        return Rows(_join([reader.read(part, start, stop, of.get(part)) for part in parts], 1))

    def _read_quantized(self, name: str, reader: Reader, of: Digests) -> Rows:
        tensor, split = self.tensors[name], self._split[name]
        assert tensor.scheme is not None
        codes = [_unpacked(reader.read(part, digest=of.get(part))) for part in self._parts[name]]
        scales = [reader.read(part, digest=of.get(part)) for part in self._scales[name]]
        shaped = [scale.view(-1, code.shape[1]) for scale, code in zip(scales, codes, strict=True)]
        joined = _join(codes, 1 if split == 0 else 0)
        if split == 1 and tensor.scheme.group_size is None:
            shaped = shaped[:1]  # a channel's scale is the same on all ranks
        return Rows(joined.t().contiguous(), _join(shaped, 1 if split == 0 else 0).t().contiguous())

    def _add(self, stored: str) -> None:
        name = self._names.from_format(stored)
        known = self._names.to_format(name)
        parts = self._of_ranks(stored, known)
        scales = self._of_ranks(stored.removesuffix(_WEIGHT) + _SCALE, known, optional=True)
        split = known.split if len(parts) > 1 else None
        self._parts[name], self._split[name] = parts, split
        if scales:
            self._scales[name] = scales
            self.tensors[name] = self._quantized(name, parts, scales, split)
        else:
            self.tensors[name] = LogicalTensor(name, _whole_shape(name, parts, split), parts[0].dtype)

    def _of_ranks(self, stored: str, known: TensorName, *, optional: bool = False) -> tuple[Piece, ...]:
        """The pieces of a stored name, one where all ranks have the same."""
        found = [rank[stored] for rank in self._ranks if stored in rank]
        if not found and optional:
            return ()
        if known.expert is not None or known.split is None:
            return tuple(found[:1])
        if len(found) != len(self._ranks):
            raise WeightsError(
                f"{self.directory}: tensor {stored} is on {len(found)} of {len(self._ranks)} ranks, which share it"
            )
        return tuple(found)

    def _quantized(
        self, name: str, parts: tuple[Piece, ...], scales: tuple[Piece, ...], split: int | None
    ) -> LogicalTensor:
        packed = parts[0].dtype == "int32"
        if parts[0].dtype not in ("int8", "int32"):
            raise WeightsError(f"{parts[0].path}: tensor {parts[0].name} has a scale and is stored as {parts[0].dtype}")
        sizes = [(p.shape[1] * (_INT4_PER_WORD if packed else 1), p.shape[0]) for p in parts]
        rows = sum(size[0] for size in sizes) if split == 0 else sizes[0][0]
        columns = sum(size[1] for size in sizes) if split == 1 else sizes[0][1]
        groups = scales[0].shape[0] * (len(parts) if split == 1 else 1) if len(scales[0].shape) == 2 else 1
        size = columns // groups if len(scales[0].shape) == 2 and scales[0].shape[0] > 1 else None
        scheme = self._scheme or Scheme(4 if packed else 8, 16, size)
        return LogicalTensor(name, (rows, columns), scales[0].dtype, scheme)


def _stretches(parts: tuple[Piece, ...], start: int, stop: int, reader: Reader, of: Digests) -> Iterable[Tensor]:
    """Rows of parts that lie one below the other."""
    begin = 0
    for part in parts:
        first, last = max(start - begin, 0), min(stop - begin, part.num_rows)
        if first < last:
            yield reader.read(part, first, last, of.get(part))
        begin += part.num_rows


def _join(tensors: list[Tensor], dim: int) -> Tensor:
    import torch

    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _whole_shape(name: str, parts: tuple[Piece, ...], split: int | None) -> tuple[int, ...]:
    shape = list(parts[0].shape)
    for part in parts[1:]:
        assert split is not None
        if len(part.shape) != len(shape) or any(
            a != b for dim, (a, b) in enumerate(zip(part.shape, parts[0].shape, strict=True)) if dim != split
        ):
            raise WeightsError(f"{part.path}: tensor {part.name} does not fit beside {parts[0].path}'s")
        shape[split] += part.shape[split]
    return tuple(shape)


class RankedTarget(Target):
    """Files of several ranks.

    Args:
        names: the format's names.
        num_ranks: ranks that share the model.
        file: a rank's file name, relative to the directory.
        num_experts: routed experts of the model, of which every rank has a stretch, whole; 0 where it has none.
    """

    def __init__(self, names: NameMap, num_ranks: int, file: Callable[[int], str], num_experts: int = 0) -> None:
        self._names, self._num_ranks, self._file, self._num_experts = names, num_ranks, file, num_experts
        if num_experts % num_ranks:
            fit = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
            raise WeightsError(
                f"{num_experts} experts do not divide among {num_ranks} ranks, each of which has whole ones; "
                f"sizes that do: {fit}"
            )

    def place(self, tensors: Iterable[LogicalTensor]) -> dict[str, tuple[Placement, ...]]:
        """See :meth:`Target.place`."""
        return {tensor.name: tuple(self._place(tensor)) for tensor in tensors}

    def _place(self, tensor: LogicalTensor) -> Iterable[Placement]:
        known = self._names.to_format(tensor.name)
        for rank in range(self._num_ranks):
            if known.expert is not None and known.expert * self._num_ranks // self._num_experts != rank:
                continue
            part = _part_of(tensor, None if known.expert is not None else known.split, rank, self._num_ranks)
            make = self._plain if tensor.scheme is None else self._quantized
            for placement in make(tensor, known.name, part):
                yield dataclasses.replace(placement, file=self._file(rank))

    def _plain(self, tensor: LogicalTensor, name: str, part: _Part) -> Iterable[Placement]:
        shape = (part.num_rows, *((part.num_columns,) if len(tensor.shape) > 1 else ()), *tensor.shape[2:])
        yield Placement("", name, tensor.dtype, shape if tensor.shape else (), part.rows, part.values)

    def _quantized(self, tensor: LogicalTensor, name: str, part: _Part) -> Iterable[Placement]:
        raise WeightsError(f"tensor {tensor.name}: {self._names.format} holds no quantized tensors")


@dataclasses.dataclass(frozen=True)
class _Part:
    """The rows and columns of a matrix that one rank has."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    narrows: bool

    @property
    def num_rows(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def num_columns(self) -> int:
        return self.columns[1] - self.columns[0]

    def values(self, rows: Rows) -> Tensor:
        return rows.values[:, slice(*self.columns)] if self.narrows else rows.values


def _part_of(tensor: LogicalTensor, split: int | None, rank: int, num_ranks: int) -> _Part:
    rows = (0, tensor.num_rows)
    columns = (0, tensor.shape[1] if len(tensor.shape) > 1 else 1)
    if split is None or num_ranks == 1:
        return _Part(rows, columns, narrows=False)
    size = tensor.shape[split]
    if size % num_ranks:
        raise WeightsError(
            f"tensor {tensor.name} has {size} {('rows', 'columns')[split]}, which {num_ranks} ranks do not divide; "
            f"sizes that do: {', '.join(str(n) for n in range(1, 129) if size % n == 0)}"
        )
    share = (rank * size // num_ranks, (rank + 1) * size // num_ranks)
    return _Part(share, columns, narrows=False) if split == 0 else _Part(rows, share, narrows=True)


class TransposedTarget(RankedTarget):
    """Ranks' files in which quantized matrices are stored as [in, out], with their scales beside them."""

    def _quantized(self, tensor: LogicalTensor, name: str, part: _Part) -> Iterable[Placement]:
        scheme = tensor.scheme
        assert scheme is not None
        words = _INT4_PER_WORD if scheme.weight_bits == 4 else 1
        if part.num_rows % words:
            raise WeightsError(
                f"tensor {tensor.name} has {part.num_rows} output channels a rank, of which {words} go into a word; "
                "take fewer ranks, or int8"
            )
        if scheme.group_size and part.narrows:
            check_width(f"{tensor.name} of one rank", part.num_columns, scheme)
        kind = "int32" if words > 1 else "int8"
        shape = (part.num_columns, part.num_rows // words)
        groups = part.num_columns // scheme.group_size if scheme.group_size else 0
        scale = (groups, part.num_rows) if groups else (part.num_rows,)

        def codes(rows: Rows) -> Tensor:
            transposed = part.values(rows).t().contiguous()
            return _packed(transposed) if words > 1 else transposed

        def scales(rows: Rows) -> Tensor:
            assert rows.scales is not None
            if not scheme.group_size:
                return rows.scales.flatten()
            first, last = (column // scheme.group_size for column in part.columns)
            return rows.scales[:, first:last].t().contiguous()

        yield Placement("", name, kind, shape, part.rows, codes, takes="all")
        yield Placement("", name.removesuffix(_WEIGHT) + _SCALE, tensor.dtype, scale, part.rows, scales, takes="all")


def _packed(codes: Tensor) -> Tensor:
    """[in, out] int4 codes to int32 [in, out / 8], as npu_convert_weight_to_int4pack packs: low bits first, signed."""
    import torch

    nibbles = (codes.to(torch.int32) & 15).view(len(codes), -1, _INT4_PER_WORD)
    packed = torch.zeros(nibbles.shape[:2], dtype=torch.int32)
    for place in range(_INT4_PER_WORD):
        packed |= nibbles[..., place] << (4 * place)
    return packed


def _unpacked(stored: Tensor) -> Tensor:
    """The int8 codes of :func:`_packed`; int8 as it is."""
    import torch

    if stored.dtype is torch.int8:
        return stored
    places = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (stored.unsqueeze(-1) >> places) & 15
    return (nibbles - ((nibbles & 8) << 1)).to(torch.int8).flatten(1)
