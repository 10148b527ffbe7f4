"""Hugging Face's checkpoints: safetensors, or pickled ones, plain, quantized, or in float8 with a scale per block."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.formats.compressed import place_whole, quantization_of, stored_parts
from npu_zoo.weights.formats.files import file_pieces
from npu_zoo.weights.quantize import Scheme, dequantize_blocks, unpack_rows
from npu_zoo.weights.reading import ITEMSIZES, Piece, Reader
from npu_zoo.weights.safetensors import INDEX_FILE, SINGLE_FILE
from npu_zoo.weights.shards import ShardNames, check_shards, find_shards
from npu_zoo.weights.tensors import Digests, LogicalTensor, Placement, Rows, Segments, Source, Target, TargetOptions
from npu_zoo.weights.torch_bin import read_weight_map

_SAFETENSORS = ShardNames(single=SINGLE_FILE, index=INDEX_FILE, pattern="*.safetensors")
_DTYPE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_SCALE_INV = "_scale_inv"


def safetensors_pieces(directory: Path) -> dict[str, Piece]:
    """The tensors of a directory of safetensors files.

    Raises:
        WeightsError: a file is missing, damaged, or contradicts another; names file and tensor.
    """
    paths, weight_map = find_shards(directory, _SAFETENSORS)
    files = {path: file_pieces(path) for path in paths}
    check_shards(directory, _SAFETENSORS, weight_map, files)
    return {name: piece for pieces in files.values() for name, piece in pieces.items()}


def bin_pieces(directory: Path) -> dict[str, Piece]:
    """The tensors of a directory of pickled files, none of whose code is executed.

    Raises:
        WeightsError: a file is missing, damaged, asks for code, or holds a tensor whose rows are not in order.
    """
    files = sorted(set(read_weight_map(directory).values()))
    return {name: piece for file in files for name, piece in file_pieces(directory / file).items()}


class HfSource(Source):
    """A checkpoint under Hugging Face's names.

    Args:
        directory: for messages.
        pieces: its stored tensors by name.
        config: config.json's content; its ``quantization_config`` says what the stored tensors mean.

    Raises:
        WeightsError: it is quantized in a way that is not known here, or a quantized tensor lacks a part.
    """

    def __init__(self, directory: Path, pieces: Mapping[str, Piece], config: Mapping[str, Any]) -> None:
        self.directory = directory
        self._stored = dict(pieces)
        self._scheme, self._block = quantization_of(directory, config)
        self._parts: dict[str, tuple[Piece, ...]] = {}
        self.tensors = {}
        rest = dict(pieces)
        for name in pieces:
            if name in rest:
                tensor, parts = self._take(name, rest)
                self.tensors[tensor.name], self._parts[tensor.name] = tensor, parts

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """See :meth:`Source.pieces`."""
        return self._parts[name]

    def row_multiple(self, name: str) -> int:
        """See :meth:`Source.row_multiple`; a block of scales is not cut."""
        return self._block[0] if self._is_float8(name) else 1

    def read(self, name: str, start: int, stop: int, reader: Reader, digests: Digests | None = None) -> Rows:
        """See :meth:`Source.read`."""
        tensor, parts = self.tensors[name], self._parts[name]
        of = {} if digests is None else digests
        values = reader.read(parts[0], start, stop, of.get(parts[0]))
        if self._is_float8(name):
            first, last = start // self._block[0], -(-stop // self._block[0])
            return Rows(dequantize_blocks(values, reader.read(parts[1], first, last, of.get(parts[1])), self._block))
        if tensor.scheme is None:
            return Rows(values)
        scales = reader.read(parts[1], start, stop, of.get(parts[1])).view(stop - start, -1)
        if not tensor.scheme.packs:
            return Rows(values, scales)
        return Rows(unpack_rows(values, tensor.scheme.weight_bits, tensor.shape[1]), scales)

    def _is_float8(self, name: str) -> bool:
        return self._parts[name][0].dtype in _FLOAT8

    def _take(self, name: str, rest: dict[str, Piece]) -> tuple[LogicalTensor, tuple[Piece, ...]]:
        """The logical tensor that a stored one belongs to, with all of its parts, which are taken out of ``rest``."""
        scheme = self._scheme
        logical, suffixes = stored_parts(name, scheme, rest)
        if suffixes:
            assert scheme is not None
            return self._quantized(logical, scheme, [self._part(logical, s, rest) for s in suffixes])
        if name.endswith(_SCALE_INV) and name.removesuffix(_SCALE_INV) in rest:
            return self._take(name.removesuffix(_SCALE_INV), rest)
        piece = rest.pop(name)
        if piece.dtype not in _FLOAT8:
            return LogicalTensor(name, piece.shape, piece.dtype), (piece,)
        scales = rest.pop(name + _SCALE_INV, None)
        if scales is None:
            raise WeightsError(f"{piece.path}: tensor {name} is stored as {piece.dtype} without {name}{_SCALE_INV}")
        due = tuple(-(-size // block) for size, block in zip(piece.shape, self._block, strict=False))
        if len(piece.shape) != 2 or scales.shape != due:
            raise WeightsError(
                f"{scales.path}: tensor {scales.name} has shape {list(scales.shape)}; {list(due)} is due for blocks of "
                f"{self._block[0]} x {self._block[1]} of {list(piece.shape)}"
            )
        return LogicalTensor(name, piece.shape, "bfloat16"), (piece, scales)

    def _part(self, logical: str, suffix: str, rest: dict[str, Piece]) -> Piece:
        name = logical.removesuffix("weight") + suffix
        if name not in rest:
            raise WeightsError(f"{self.directory}: tensor {name} is missing beside {logical}'s other parts")
        return rest.pop(name)

    def _quantized(self, name: str, scheme: Scheme, parts: list[Piece]) -> tuple[LogicalTensor, tuple[Piece, ...]]:
        codes, scales, *shapes = parts
        if shapes:
            with Reader() as reader:
                rows, columns = reader.read(shapes[0]).tolist()
        else:
            rows, columns = codes.shape
        tensor = LogicalTensor(name, (rows, columns), scales.dtype, scheme)
        words = -(-columns // scheme.codes_per_word) if scheme.packs else columns
        for piece, due in ((codes, (rows, words)), (scales, (rows, scheme.num_groups(columns)))):
            if math.prod(piece.shape) != math.prod(due) or piece.shape[:1] != due[:1]:
                found = list(piece.shape)
                raise WeightsError(f"{piece.path}: tensor {piece.name} has shape {found}; {list(due)} is due")
        return tensor, tuple(parts)


class HfTarget(Target):
    """Hugging Face's names and files, in shards that hold ``shard_size`` bytes at most, or one larger tensor."""

    stem: str
    suffix: str
    index: str

    def __init__(self, options: TargetOptions) -> None:
        self._shard_size = options.shard_size

    def place(self, tensors: Iterable[LogicalTensor]) -> dict[str, tuple[Placement, ...]]:
        """See :meth:`Target.place`."""
        ordered = sorted(tensors, key=lambda tensor: _by_layer(tensor.name))
        placed = {tensor.name: place_whole(tensor) for tensor in ordered}
        shards: list[int] = [0]
        numbers: dict[str, int] = {}
        for name, placements in placed.items():
            size = sum(placement.num_bytes for placement in placements)
            if shards[-1] and shards[-1] + size > self._shard_size:
                shards.append(0)
            shards[-1] += size
            numbers[name] = len(shards)
        return {
            name: tuple(replace(placement, file=self._file(numbers[name], len(shards))) for placement in placements)
            for name, placements in placed.items()
        }

    def side_files(self, placed: Mapping[str, tuple[Placement, ...]]) -> dict[str, Any]:
        """The index, where there are several files."""
        stored = [placement for placements in placed.values() for placement in placements]
        if len({placement.file for placement in stored}) < 2:
            return {}
        weight_map = {placement.name: placement.file for placement in sorted(stored, key=lambda p: p.name)}
        return {self.index: {"metadata": {"total_size": sum(p.num_bytes for p in stored)}, "weight_map": weight_map}}

    def _file(self, number: int, count: int) -> str:
        return f"{self.stem}{self.suffix}" if count == 1 else f"{self.stem}-{number:05d}-of-{count:05d}{self.suffix}"


def _by_layer(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts names with numbers in them by those numbers, so that files follow from the names alone."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name))


class SafetensorsTarget(HfTarget):
    """``*.safetensors``."""

    stem, suffix, index = "model", ".safetensors", INDEX_FILE

    def lay_out(self, path: Path, placements: Iterable[Placement]) -> dict[str, Segments]:
        """See :meth:`Target.lay_out`."""
        return lay_out_safetensors(path, placements)


class BinTarget(HfTarget):
    """``pytorch_model*.bin``, as torch.save writes it."""

    stem, suffix, index = "pytorch_model", ".bin", "pytorch_model.bin.index.json"

    def lay_out(self, path: Path, placements: Iterable[Placement]) -> dict[str, Segments]:
        """See :meth:`Target.lay_out`."""
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.serialization import skip_data

        with FakeTensorMode():
            state = {p.name: torch.empty(p.shape, dtype=getattr(torch, p.dtype)) for p in placements}
        with skip_data(materialize_fake_tensors=True):
            torch.save(state, path)
        return {name: piece.chunks for name, piece in file_pieces(path).items()}


def lay_out_safetensors(path: Path, placements: Iterable[Placement]) -> dict[str, Segments]:
    """Write a safetensors file without its tensors' bytes; wide elements first, for their alignment, then by name."""
    ordered = sorted(placements, key=lambda p: (-ITEMSIZES[p.dtype], p.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for placement in ordered:
        offsets[placement.name], end = end, end + placement.num_bytes
        header[placement.name] = {
            "dtype": _dtype_name(path, placement),
            "shape": list(placement.shape),
            "data_offsets": [offsets[placement.name], end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(begin + end)
    return {p.name: ((begin + offsets[p.name], p.num_bytes),) for p in ordered}


def _dtype_name(path: Path, placement: Placement) -> str:
    if placement.dtype not in _DTYPE_NAMES:
        raise WeightsError(f"{path}: tensor {placement.name}: safetensors holds no {placement.dtype}")
    return _DTYPE_NAMES[placement.dtype]


def read_safetensors(directory: Path, config: Mapping[str, Any]) -> HfSource:
    """A directory of safetensors files; see :class:`HfSource`."""
    return HfSource(directory, safetensors_pieces(directory), config)


def read_bin(directory: Path, config: Mapping[str, Any]) -> HfSource:
    """A directory of pickled files; see :class:`HfSource`."""
    return HfSource(directory, bin_pieces(directory), config)
