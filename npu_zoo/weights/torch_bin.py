"""pytorch_model*.bin: zip files of torch.save, read without running the pickle in them, their index without torch.

The member ``NAME/data.pkl`` describes the tensors; the bytes of storage KEY are the member ``NAME/data/KEY``, not
compressed.

Source: torch/serialization.py; torch/_utils.py: _rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_parameter.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.header import TensorEntry
from npu_zoo.weights.mapping import map_file, view_tensor
from npu_zoo.weights.pickled import Call, Global, Interpreter, PersistentId, set_item
from npu_zoo.weights.shards import ShardNames, check_shards, find_shards

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"
MAX_PICKLE_BYTES = 100_000_000
MAX_DIRECTORY_BYTES = 16 * 1024 * 1024
"""Limits that no checkpoint comes near: some 300 bytes and 100 bytes a tensor."""

_NAMES = ShardNames(single=SINGLE_FILE, index=INDEX_FILE, pattern="pytorch_model-*-of-*.bin")

_STORAGES: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
ITEMSIZES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
"""The bytes of one element, by torch's names of the dtypes that are read."""

_UNTYPED = Global("torch.storage", "UntypedStorage")
_ORDERED_DICT = Global("collections", "OrderedDict")
_TENSOR_V2 = Global("torch._utils", "_rebuild_tensor_v2")
_TENSOR_V3 = Global("torch._utils", "_rebuild_tensor_v3")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_TAKEN = {_UNTYPED, _ORDERED_DICT, _TENSOR_V2, _TENSOR_V3, _PARAMETER}
_TAKEN |= {Global("torch", name) for name in (*_STORAGES, *ITEMSIZES)}

_LEGACY = (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", b"ustar")
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class BinTensor:
    """One tensor of a file. Several may share a storage.

    Attributes:
        dtype: torch's name of the stored dtype.
        shape, strides, storage_offset: in elements.
        storage: the zip member that holds the storage.
        offset: where the storage's first byte lies, counted from the beginning of the file.
        nbytes: the bytes of the whole storage.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: str
    storage_offset: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int


@dataclass(frozen=True)
class _Rebuilt:
    """A tensor as the pickle describes it, nothing of it checked."""

    storage: Any
    storage_offset: Any
    shape: Any
    strides: Any
    dtype: Any


def read_weight_map(directory: Path) -> dict[str, str]:
    """The file of every tensor: tensor name to file name.

    ``pytorch_model.bin`` is taken where it exists, else the shards that ``pytorch_model.bin.index.json`` names, else
    every ``pytorch_model-XXXXX-of-YYYYY.bin``.

    Raises:
        WeightsError: a file is missing, damaged or a link out of the directory, or the index contradicts the files.
    """
    paths, weight_map = find_shards(directory, _NAMES)
    found = {path: list(read_index(path)) for path in paths}
    check_shards(directory, _NAMES, weight_map, found)
    return {name: path.relative_to(directory).as_posix() for path, names in found.items() for name in names}


def read_index(path: Path) -> dict[str, BinTensor]:
    """The tensors of one file in the order of its state dict, each checked to lie within its storage.

    Raises:
        WeightsError: the file cannot be read, is no flat state dict in a zip file of torch.save, or asks for code.
    """
    try:
        with path.open("rb") as file:
            members = _read_members(path, file)
            root = _root(path, members)
            _check_byteorder(path, file, members.get(f"{root}/byteorder"))
            state = _read_pickle(path, _read(file, members[f"{root}/data.pkl"], MAX_PICKLE_BYTES, path))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    return {name: _tensor(path, name, value, root, members) for name, value in _flat(path, state).items()}


def read_tensor(path: Path, tensor: BinTensor) -> Tensor:
    """One tensor of :func:`read_index`, contiguous, in the stored dtype.

    Where it is contiguous in the file it is a view of the mapped file: writing into it ends the process.

    Raises:
        WeightsError: the file cannot be mapped, or has shrunk.
    """
    buffer = map_file(path)
    itemsize = ITEMSIZES[tensor.dtype]
    if tensor.offset + tensor.nbytes > len(buffer):
        raise WeightsError(f"{path}: tensor {tensor.name}: the file was truncated to {len(buffer)} bytes")
    start = tensor.offset + tensor.storage_offset * itemsize
    span = _span(tensor.shape, tensor.strides)
    shape = (span,) if span else tensor.shape
    flat = view_tensor(buffer, TensorEntry(tensor.name, tensor.dtype, itemsize, shape, start, start + span * itemsize))
    strided = flat.as_strided(tensor.shape, tensor.strides) if span else flat
    # A stride of a dimension of one element may be anything; viewing anew gives those that torch would.
    return flat.view(tensor.shape) if strided.is_contiguous() else strided.contiguous()


# The zip file


class _DirectoryFile(io.BufferedReader):
    """A zip file's bytes; no read of them is larger than a directory may be."""

    def read(self, size: int | None = -1, /) -> bytes:
        position = self.tell()
        left = self.seek(0, 2) - position
        self.seek(position)
        length = left if size is None or size < 0 else min(size, left)
        if length > MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {length} bytes; the limit is {MAX_DIRECTORY_BYTES}")
        return super().read(length)


def _read_members(path: Path, file: BinaryIO) -> dict[str, _Member]:
    try:
        with _DirectoryFile(path.open("rb", buffering=0)) as directory, zipfile.ZipFile(directory) as archive:
            infos, stop = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError, EOFError) as error:
        raise _no_zip(path, file, error) from error
    members: dict[str, _Member] = {}
    due = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if not info.filename.isprintable():
            raise WeightsError(f"{path}: the member name {_shown(info.filename)} cannot be printed")
        if info.filename in members:
            raise WeightsError(f"{path}: member {info.filename} is in the zip file twice")
        if info.header_offset < due:
            raise WeightsError(f"{path}: member {info.filename} overlaps what is before it")
        member = _member(path, file, info)
        due = member.offset + member.size
        if due > stop:
            raise WeightsError(f"{path}: member {info.filename} ends at byte {due}, after the members' end at {stop}")
        members[info.filename] = member
    return members


def _no_zip(path: Path, file: BinaryIO, error: Exception) -> WeightsError:
    file.seek(0)
    start = file.read(512)
    if start.startswith(_LEGACY[0]) or start[257:262] == _LEGACY[1]:
        load = f"torch.load({str(path)!r}, map_location='cpu', weights_only=True)"
        return WeightsError(
            f"{path} was saved by torch before 1.6, in a form that cannot be read lazily; save it anew:\n"
            f'  python -c "import torch; torch.save({load}, {str(path) + ".new"!r})"'
        )
    return WeightsError(f"{path}: no zip file of torch.save, or a truncated one: {error}")


def _member(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> _Member:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise WeightsError(f"{path}: member {info.filename} is compressed or encrypted, which torch.save never does")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size:
        raise WeightsError(f"{path}: member {info.filename} lies behind the end of the file")
    magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    if magic != b"PK\x03\x04":
        raise WeightsError(f"{path}: member {info.filename} is not where the zip file's directory says")
    return _Member(info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes, info.file_size)


def _root(path: Path, members: Mapping[str, _Member]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise WeightsError(f"{path}: no file of torch.save: it has {len(roots)} members data.pkl, one is due")
    return roots[0]


def _check_byteorder(path: Path, file: BinaryIO, member: _Member | None) -> None:
    if member is not None and (order := _read(file, member, 16, path)) != b"little":
        raise WeightsError(f"{path}: its byte order is {order!r}; save it anew on a little-endian machine")


def _read(file: BinaryIO, member: _Member, limit: int, path: Path) -> bytes:
    if member.size > limit:
        raise WeightsError(f"{path}: a member of {member.size} bytes, where the limit is {limit}")
    file.seek(member.offset)
    return file.read(member.size)


# The pickle


def _read_pickle(path: Path, raw: bytes) -> Any:
    def check(name: Global) -> None:
        if name not in _TAKEN:
            shown = ascii(f"{name.module}.{name.name}")[1:-1][:120]
            raise WeightsError(
                f"{path} holds code ({shown}) beside tensors; it was not executed; "
                "use a checkpoint of tensors alone, best as safetensors"
            )

    try:
        return Interpreter(check, _call).run(raw)
    except (ValueError, OverflowError) as error:
        raise WeightsError(f"{path}: its data.pkl is no pickle of a state dict: {error}") from error


def _call(call: Call) -> Any:
    """What stands for a call's result, by the calls that torch.save writes."""
    count = len(call.arguments)
    if call.function == _ORDERED_DICT and count == 0:
        return {}
    if call.function == _ORDERED_DICT and count == 1 and isinstance(call.arguments[0], list):
        return _dict_of_pairs(call.arguments[0])
    if call.function == _TENSOR_V2 and count in (6, 7):
        return _rebuilt(call.arguments[:4], None, call.arguments[6:])
    if call.function == _TENSOR_V3 and count in (7, 8):
        return _rebuilt(call.arguments[:4], call.arguments[6], call.arguments[7:])
    if call.function == _PARAMETER and count == 3 and isinstance(call.arguments[0], _Rebuilt):
        return call.arguments[0]
    raise ValueError(f"it calls {call.function.module}.{call.function.name} with {count} arguments")


def _rebuilt(arguments: tuple[Any, ...], dtype: Any, metadata: tuple[Any, ...]) -> _Rebuilt:
    storage, storage_offset, shape, strides = arguments
    if any(metadata):  # a negative or conjugate bit, or a device's own format: the bytes do not say all
        raise ValueError("a tensor in it is more than its bytes: it has metadata")
    return _Rebuilt(storage, storage_offset, shape, strides, dtype)


def _dict_of_pairs(pairs: list[Any]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("it makes an OrderedDict of what are no pairs")
        set_item(made, pair[0], pair[1])
    return made


# The state dict


def _flat(path: Path, state: Any) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise WeightsError(f"{path} holds a {_kind(state)}, a state dict is due")
    for name, value in state.items():
        if isinstance(value, dict):
            raise WeightsError(
                f"{path} holds no flat state dict: its keys are {_some(state)}, and {_shown(name)} is a dict of its "
                f"own, of {_some(value)}; save the dict of tensors alone"
            )
        if not isinstance(value, _Rebuilt) or not isinstance(name, str):
            raise WeightsError(
                f"{path} holds no flat state dict: {_shown(name)} is a {_kind(value)}; a tensor with a name is due"
            )
    return state


def _shown(name: Any) -> str:
    text = ascii(name)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, _Rebuilt) else type(value).__name__


def _some(items: Mapping[Any, Any]) -> str:
    names = [_shown(name) for name in list(items)[:6]]
    return ", ".join(names) + (f" and {len(items) - 6} more" if len(items) > 6 else "") or "nothing"


def _tensor(path: Path, name: str, rebuilt: _Rebuilt, root: str, members: Mapping[str, _Member]) -> BinTensor:
    if not name or not name.isprintable():
        raise WeightsError(f"{path}: the tensor name {_shown(name)} cannot be printed")
    try:
        dtype, key, numel = _storage(rebuilt)
        _check_geometry(rebuilt, numel)
        storage = f"{root}/data/{key}"
        if storage not in members:
            raise ValueError(f"its storage {storage} is not in the file")
        nbytes = members[storage].size
        if nbytes != numel * ITEMSIZES[dtype]:
            raise ValueError(f"its storage has {nbytes} bytes, {numel} elements of {dtype} are due")
    except ValueError as error:
        raise WeightsError(f"{path}: tensor {name}: {error}") from error
    shape, strides = tuple(rebuilt.shape), tuple(rebuilt.strides)
    return BinTensor(name, dtype, shape, strides, storage, rebuilt.storage_offset, members[storage].offset, nbytes)


def _storage(rebuilt: _Rebuilt) -> tuple[str, str, int]:
    """A storage's dtype, key and number of elements."""
    value = rebuilt.storage.value if isinstance(rebuilt.storage, PersistentId) else None
    if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
        raise ValueError("it has no storage")
    _, kind, key, _, size = value
    if not isinstance(kind, Global) or not isinstance(key, str) or not _is_size(size):
        raise ValueError("its storage has no type, key and size")
    if kind == _UNTYPED:
        dtype = rebuilt.dtype.name if isinstance(rebuilt.dtype, Global) else ""
        if dtype not in ITEMSIZES or size % ITEMSIZES[dtype]:
            raise ValueError(f"its storage of {size} bytes has no dtype that is known")
        return dtype, key, size // ITEMSIZES[dtype]
    if kind.name not in _STORAGES or rebuilt.dtype is not None:
        raise ValueError(f"its storage is a {kind.module}.{kind.name}")
    return _STORAGES[kind.name], key, size


def _check_geometry(rebuilt: _Rebuilt, numel: int) -> None:
    shape, strides, offset = rebuilt.shape, rebuilt.strides, rebuilt.storage_offset
    for sizes in (shape, strides):
        if not isinstance(sizes, tuple) or len(sizes) > 64 or not all(map(_is_size, sizes)):
            raise ValueError("its shape and strides are no tuples of sizes")
    if len(shape) != len(strides) or not _is_size(offset):
        raise ValueError(f"{len(shape)} sizes and {len(strides)} strides do not describe a tensor")
    if math.prod(shape) > numel or math.prod(max(size, 1) for size in shape) >= 2**63:
        raise ValueError(
            f"shape {list(shape)} has more elements than its storage, which has {numel}; save it contiguous"
        )
    span = _span(shape, strides)
    if span and offset + span > numel:
        raise ValueError(
            f"shape {list(shape)} with strides {list(strides)} from element {offset} on "
            f"lies outside its storage of {numel} elements"
        )


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The number of elements from a tensor's first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
