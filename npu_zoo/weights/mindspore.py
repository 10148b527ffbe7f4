"""MindSpore's .ckpt files, read and written without MindSpore and without a protobuf library.

A file is one serialised ``Checkpoint`` message after another, which together are one message again::

    Checkpoint  { repeated Value value = 1; }
    Value       { required string tag = 1; oneof { TensorProto tensor = 2; MapTensorProto maptensor = 3; } }
    TensorProto { repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3; }

A tensor of more than 512 MiB is spread over consecutive values of the same tag, each with the dims of the whole. A
scalar has the dims ``[0]``. The file may end with ``crc_num`` and the CRC-32 of all bytes before it, in 10 bytes,
big-endian.

Source: mindspore/ccsrc/utils/checkpoint.proto and mindspore/python/mindspore/train/serialization.py.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from npu_zoo.core.errors import WeightsError

TENSOR_TYPES: dict[str, tuple[str, int]] = {
    "Float64": ("float64", 8),
    "Float32": ("float32", 4),
    "Float16": ("float16", 2),
    "BFloat16": ("bfloat16", 2),
    "Int64": ("int64", 8),
    "Int32": ("int32", 4),
    "Int16": ("int16", 2),
    "Int8": ("int8", 1),
    "UInt64": ("uint64", 8),
    "UInt32": ("uint32", 4),
    "UInt16": ("uint16", 2),
    "UInt8": ("uint8", 1),
    "Bool": ("bool", 1),
}
"""MindSpore's names of the dtypes: torch's name and the bytes of one element."""

_OLD_TENSOR_TYPES = {f"Uint{bits}": TENSOR_TYPES[f"UInt{bits}"] for bits in (8, 16, 32, 64)}
_TEXT_TYPE = "str"
_TENSOR_TYPE_OF = {dtype: (name, itemsize) for name, (dtype, itemsize) in TENSOR_TYPES.items()}

MAX_CONTENT_BYTES = 512 * 1024 * 1024
"""What one value holds at most, in the files that are written."""

MAX_NAME_BYTES = 65_536
MAX_DIMS = 64

_CRC_MARK = b"crc_num"
_CRC_BYTES = 10
_TRAILER_BYTES = len(_CRC_MARK) + _CRC_BYTES
_COPY_BYTES = 1024 * 1024
_CIPHER_MARKS = tuple(number.to_bytes(4, "little") for number in (0x7F3A5ED8, 0x7F3A5ED9, 0x7F3A5EDA))

_VARINT, _BYTES = 0, 2


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a file.

    Attributes:
        dtype: torch's name of the stored dtype; ``"str"`` for a text beside the tensors, in UTF-32, little-endian.
        shape: ``()`` for a scalar and for a text.
        chunks: where its bytes lie: (offset in the file, length) pairs in order, little-endian, row-major.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]


def read_index(path: Path) -> dict[str, CheckpointTensor]:
    """The tensors of one file in file order; their content is skipped, not read.

    Raises:
        WeightsError: the file cannot be read, is encrypted, or breaks the format; names file and tensor.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if file.read(4) in _CIPHER_MARKS:
                raise WeightsError(f"{path} is encrypted; decrypt it with MindSpore: load_checkpoint, save_checkpoint")
            stop = size if _read_trailer(file, size) is None else size - _TRAILER_BYTES
            return _IndexReader(path, file).read(stop)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error


def verify_checksum(path: Path) -> bool | None:
    """Whether a file's bytes have the checksum that it ends with; None where it ends with none.

    Raises:
        WeightsError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            expected = _read_trailer(file, size)
            if expected is None:
                return None
            file.seek(0)
            left, found = size - _TRAILER_BYTES, 0
            while left and (piece := file.read(min(left, _COPY_BYTES))):
                found = zlib.crc32(piece, found)
                left -= len(piece)
            return not left and found == expected
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_trailer(file: BinaryIO, size: int) -> int | None:
    if size < _TRAILER_BYTES:
        return None
    file.seek(size - _TRAILER_BYTES)
    trailer = file.read(_TRAILER_BYTES)
    return int.from_bytes(trailer[-_CRC_BYTES:], "big") if trailer.startswith(_CRC_MARK) else None


@dataclass(frozen=True)
class _Field:
    """A field of a message: a number, or the place of its bytes."""

    number: int
    wire_type: int
    value: int
    start: int
    stop: int


@dataclass
class _Pending:
    """A tensor whose values are being gathered."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    due: int
    chunks: list[tuple[int, int]] = field(default_factory=list)
    found: int = 0

    def finish(self) -> CheckpointTensor:
        return CheckpointTensor(self.name, self.dtype, self.shape, tuple(self.chunks))


class _IndexReader:
    """Reads messages by their places in the file; three levels deep, never deeper."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._where = "the beginning"
        self._pending: _Pending | None = None
        self._tensors: dict[str, CheckpointTensor] = {}

    def read(self, stop: int) -> dict[str, CheckpointTensor]:
        for message in self._fields(0, stop):
            self._where = f"the value at byte {message.start}"
            self._expect(message, (1,), "a checkpoint")
            self._add(self._read_value(message))
        self._settle()
        if not self._tensors:
            raise WeightsError(f"{self._path} holds no tensor; it is empty, or was truncated")
        return self._tensors

    def _read_value(self, message: _Field) -> _Pending:
        seen: dict[int, _Field] = {}
        for part in self._fields(message.start, message.stop):
            if part.number == 3:
                name = self._text(seen[1], MAX_NAME_BYTES, "name") if 1 in seen else "?"
                raise self._fault(f"{name} is a map tensor, which holds no weights of a language model")
            self._expect(part, (1, 2), "a value")
            if part.number in seen:
                raise self._fault(f"{'its tensor' if part.number == 2 else 'its name'} stands twice")
            seen[part.number] = part
            if part.number == 1:
                self._where = f"tensor {self._name(part)}"
        if 1 not in seen or 2 not in seen:
            raise self._fault("it has no name" if 1 not in seen else "it has no tensor")
        return self._read_tensor(self._name(seen[1]), seen[2])

    def _read_tensor(self, name: str, message: _Field) -> _Pending:
        dims: list[int] = []
        seen: dict[int, _Field] = {}
        for part in self._fields(message.start, message.stop):
            if part.number == 1:
                dims += self._numbers(part) if part.wire_type == _BYTES else [part.value]
                if len(dims) > MAX_DIMS:
                    raise self._fault(f"it has more than {MAX_DIMS} dims")
                continue
            self._expect(part, (2, 3), "a tensor")
            if part.number in seen:
                raise self._fault(f"field {part.number} of it stands twice")
            seen[part.number] = part
        if 2 not in seen or 3 not in seen:
            raise self._fault("it has no tensor_type" if 2 not in seen else "it has no tensor_content")
        kind = self._text(seen[2], 64, "tensor_type")
        content = (seen[3].start, seen[3].stop - seen[3].start)
        return self._describe(name, kind, dims, content)

    def _describe(self, name: str, kind: str, dims: list[int], content: tuple[int, int]) -> _Pending:
        length = content[1]
        if kind == _TEXT_TYPE:
            if length % 4:
                raise self._fault(f"{length} bytes are no text in UTF-32")
            return _Pending(name, _TEXT_TYPE, (), length, [content], length)
        if kind not in TENSOR_TYPES and kind not in _OLD_TENSOR_TYPES:
            raise self._fault(f"tensor_type {kind!r} is not known; known: {', '.join(TENSOR_TYPES)}, {_TEXT_TYPE}")
        dtype, itemsize = TENSOR_TYPES.get(kind) or _OLD_TENSOR_TYPES[kind]
        if any(size >= 2**63 for size in dims):
            raise self._fault("one of its dims is negative")
        shape = () if dims == [0] and length else tuple(dims)
        if math.prod(max(size, 1) for size in shape) >= 2**63:
            raise self._fault(f"shape {list(shape)} is larger than any tensor")
        return _Pending(name, dtype, shape, math.prod(shape) * itemsize, [content], length)

    def _add(self, part: _Pending) -> None:
        pending = self._pending
        if pending is None or pending.name != part.name:
            self._settle()
            if part.name in self._tensors:
                raise self._fault("it stands in the file twice")
            self._pending = pending = part
        elif pending.found >= pending.due or not part.found:
            raise self._fault("it stands in the file twice, one after the other")
        elif (pending.dtype, pending.shape) != (part.dtype, part.shape):
            raise self._fault(
                f"its parts are {pending.dtype} of shape {list(pending.shape)} and {part.dtype} of {list(part.shape)}"
            )
        else:
            pending.chunks += part.chunks
            pending.found += part.found
        if pending.found > pending.due:
            raise self._fault(self._contradiction(pending))

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.found != pending.due:
            raise WeightsError(f"{self._path}: tensor {pending.name}: {self._contradiction(pending)}")
        self._tensors[pending.name] = pending.finish()

    def _contradiction(self, pending: _Pending) -> str:
        shape = list(pending.shape)
        return f"{pending.dtype} of shape {shape} takes {pending.due} bytes, the file has {pending.found}"

    def _fields(self, start: int, stop: int) -> Iterator[_Field]:
        while start < stop:
            key, start = self._varint(start, stop)
            number, wire_type = key >> 3, key & 7
            if wire_type not in (_VARINT, _BYTES):
                raise self._fault(
                    f"field {number} is of wire type {wire_type}; no MindSpore checkpoint, or a damaged one"
                )
            value, begin = self._varint(start, stop)
            start = begin
            if wire_type == _BYTES:
                start = begin + value
                if start > stop:
                    raise self._fault(
                        f"field {number} would have {value} bytes, {stop - begin} are left; is the file truncated?"
                    )
            yield _Field(number, wire_type, value, begin, start)

    def _varint(self, start: int, stop: int) -> tuple[int, int]:
        """The number at a place, and the place after it."""
        self._file.seek(start)
        number = 0
        for count, byte in enumerate(self._file.read(min(10, stop - start))):
            number |= (byte & 0x7F) << (7 * count)
            if byte < 0x80:
                if number >= 2**64:
                    break
                return number, start + count + 1
        raise self._fault(f"byte {start} begins no number of 64 bits; is the file truncated?")

    def _numbers(self, part: _Field) -> list[int]:
        numbers: list[int] = []
        start = part.start
        while start < part.stop and len(numbers) <= MAX_DIMS:
            number, start = self._varint(start, part.stop)
            numbers.append(number)
        return numbers

    def _name(self, part: _Field) -> str:
        name = self._text(part, MAX_NAME_BYTES, "name")
        if not name or not name.isprintable():
            raise self._fault(f"its name {name[:80]!r} cannot be printed")
        return name

    def _text(self, part: _Field, limit: int, what: str) -> str:
        if part.stop - part.start > limit:
            raise self._fault(f"its {what} has {part.stop - part.start} bytes; the limit is {limit}")
        self._file.seek(part.start)
        try:
            return self._file.read(part.stop - part.start).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fault(f"its {what} is not UTF-8") from error

    def _expect(self, part: _Field, numbers: tuple[int, ...], what: str) -> None:
        if part.number not in numbers:
            raise self._fault(f"{what} has no field {part.number}; no MindSpore checkpoint, or a damaged one")
        if part.wire_type != _BYTES:
            raise self._fault(f"field {part.number} of {what} is a number, bytes are due")

    def _fault(self, fault: str) -> WeightsError:
        return WeightsError(f"{self._path}: {self._where}: {fault}")


class CheckpointWriter:
    """Writes a .ckpt file that MindSpore loads, tensor by tensor, into a file that the caller opened.

    What was written is no checkpoint before :meth:`finish` has returned, and after an error never: write under another
    name and rename.

    Args:
        file: open for writing, buffered; it is only ever appended to.
        checksum: end the file with its CRC-32, as MindSpore's ``crc_check`` does.
    """

    def __init__(self, file: BinaryIO, *, checksum: bool = False) -> None:
        self._file = file
        self._checksum = checksum
        self._crc = 0
        self._names: set[str] = set()
        self._closed = ""

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Iterable[bytes | memoryview]) -> None:
        """Append one tensor.

        Args:
            name: the parameter's name.
            dtype: torch's name of the dtype.
            shape: ``()`` for a scalar.
            data: the tensor's bytes in pieces of any size, little-endian, row-major.

        Raises:
            WeightsError: the format has no such dtype, the name was added before, or data has not the shape's size.
            OSError: as the file raises it.
        """
        kind, size = self._describe(name, dtype, shape)
        self._closed = f"tensor {name} was not written to its end"
        self._add(name, kind, shape, _Pieces(name, size, data))
        self._closed = ""

    def reserve(self, name: str, dtype: str, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Append one tensor but for its bytes, which the caller writes into the file by itself.

        Args:
            name, dtype, shape: as for :meth:`add`.

        Returns:
            Where the bytes go: (offset in the file, length) pairs in order.

        Raises:
            WeightsError: as for :meth:`add`; or the file is to end with a checksum, which takes the bytes in order.
            OSError: as the file raises it.
        """
        if self._checksum:
            raise WeightsError("a checkpoint that ends with a checksum is written in order; leave the checksum out")
        kind, size = self._describe(name, dtype, shape)
        chunks = []
        for head, length in _values(name, kind, shape, size):
            self._write(head)
            chunks.append((self._file.tell(), length))
            self._file.seek(length, 1)
        return tuple(chunks)

    def _describe(self, name: str, dtype: str, shape: tuple[int, ...]) -> tuple[str, int]:
        """A tensor's type in the file and its bytes; the name is taken then."""
        self._check_open()
        kind, itemsize = _tensor_type(name, dtype)
        if name in self._names:
            raise WeightsError(f"tensor {name} cannot be written twice into one checkpoint")
        if not name or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
            raise WeightsError(f"{name[:80]!r} is no tensor name that a checkpoint can hold")
        if len(shape) > MAX_DIMS or any(not 0 <= size < 2**63 for size in shape):
            raise WeightsError(f"tensor {name}: shape {list(shape)} is no list of at most {MAX_DIMS} sizes")
        self._names.add(name)
        return kind, math.prod(shape) * itemsize

    def finish(self) -> None:
        """Write what stands after the last tensor, and flush the file; nothing can be added after it.

        Raises:
            WeightsError: a tensor was not written to its end, or the checkpoint is finished already.
            OSError: as the file raises it.
        """
        self._check_open()
        self._closed = "the checkpoint is finished"
        if self._checksum:
            self._file.write(_CRC_MARK + self._crc.to_bytes(_CRC_BYTES, "big"))
        self._file.flush()

    def _add(self, name: str, kind: str, shape: tuple[int, ...], pieces: _Pieces) -> None:
        for head, length in _values(name, kind, shape, pieces.left):
            self._write(head)
            for piece in pieces.take(length):
                self._write(piece)
        pieces.expect_end()

    def _write(self, piece: bytes | memoryview) -> None:
        self._file.write(piece)
        if self._checksum:
            self._crc = zlib.crc32(piece, self._crc)

    def _check_open(self) -> None:
        if self._closed:
            raise WeightsError(f"{self._closed}; nothing can be added to the checkpoint any more")


def _values(name: str, kind: str, shape: tuple[int, ...], size: int) -> Iterator[tuple[bytes, int]]:
    """What stands before each of a tensor's stretches of bytes, and how long that stretch is."""
    dims = b"".join(b"\x08" + _encode(length) for length in shape or (0,))
    head = dims + _open_field(2, len(kind)) + kind.encode()
    tag = _open_field(1, len(name.encode())) + name.encode()
    while True:
        length = min(size, MAX_CONTENT_BYTES)
        head_of_tensor = head + _open_field(3, length)
        head_of_value = tag + _open_field(2, len(head_of_tensor) + length)
        whole = len(head_of_value) + len(head_of_tensor) + length
        yield _open_field(1, whole) + head_of_value + head_of_tensor, length
        size -= length
        if not size:
            return


_NO_BYTES = memoryview(b"")


class _Pieces:
    """A tensor's data, cut anew."""

    def __init__(self, name: str, size: int, data: Iterable[bytes | memoryview]) -> None:
        self.left = size
        self._name = name
        self._size = size
        self._views = (memoryview(piece).cast("B") for piece in data if memoryview(piece).nbytes)
        self._rest = _NO_BYTES

    def take(self, length: int) -> Iterator[memoryview]:
        """Exactly that many bytes."""
        while length:
            view = self._rest if self._rest else next(self._views, _NO_BYTES)
            if not view:
                raise WeightsError(
                    f"tensor {self._name}: its shape takes {self._size} bytes, data has {self._size - self.left}"
                )
            piece, self._rest = view[:length], view[length:]
            length -= len(piece)
            self.left -= len(piece)
            yield piece

    def expect_end(self) -> None:
        if self._rest or next(self._views, _NO_BYTES):
            raise WeightsError(f"tensor {self._name}: its shape takes {self._size} bytes, data has more")


def _tensor_type(name: str, dtype: str) -> tuple[str, int]:
    try:
        return _TENSOR_TYPE_OF[dtype]
    except KeyError:
        known = ", ".join(_TENSOR_TYPE_OF)
        raise WeightsError(f"tensor {name}: a MindSpore checkpoint holds no {dtype}; it holds {known}") from None


def _open_field(number: int, length: int) -> bytes:
    """What stands before a field's bytes."""
    return _encode(number << 3 | _BYTES) + _encode(length)


def _encode(number: int) -> bytes:
    """A number as a varint."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
