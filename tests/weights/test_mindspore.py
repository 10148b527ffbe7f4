from __future__ import annotations

import binascii
import io
import itertools
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights import mindspore
from npu_zoo.weights.mindspore import (
    MAX_CONTENT_BYTES,
    TENSOR_TYPES,
    CheckpointTensor,
    CheckpointWriter,
    read_index,
    verify_checksum,
)

# An encoder of the wire format, independent of the module's own.


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def field(number: int, payload: bytes | int) -> bytes:
    if isinstance(payload, int):
        return varint(number * 8) + varint(payload)
    return varint(number * 8 + 2) + varint(len(payload)) + payload


def tensor(dims: list[int] | bytes, kind: str, content: bytes) -> bytes:
    packed = field(1, dims) if isinstance(dims, bytes) else b"".join(field(1, size) for size in dims)
    return packed + field(2, kind.encode()) + field(3, content)


def value(tag: str, dims: list[int] | bytes, kind: str, content: bytes) -> bytes:
    return field(1, field(1, tag.encode()) + field(2, tensor(dims, kind, content)))


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def content(path: Path, found: CheckpointTensor) -> bytes:
    raw = path.read_bytes()
    return b"".join(raw[offset : offset + length] for offset, length in found.chunks)


def crc_trailer(raw: bytes) -> bytes:
    return b"crc_num" + binascii.crc32(raw, 0).to_bytes(10, byteorder="big")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.ckpt"


# "w", float16, [2, 1], the bytes 1 2 3 4; lengths counted by hand: 24 of the value, 19 of the tensor.
KNOWN = b"\x0a\x18" + b"\x0a\x01w" + b"\x12\x13" + b"\x08\x02\x08\x01" + b"\x12\x07Float16" + b"\x1a\x04\1\2\3\4"


# What is read


def test_a_file_written_down_byte_by_byte(path: Path) -> None:
    found = read_index(write(path, KNOWN))
    assert found == {"w": CheckpointTensor("w", "float16", (2, 1), ((22, 4),))}
    assert content(path, found["w"]) == b"\1\2\3\4"


@pytest.mark.parametrize(("kind", "expected"), [*TENSOR_TYPES.items(), ("Uint8", ("uint8", 1))])
def test_every_type_is_read(path: Path, kind: str, expected: tuple[str, int]) -> None:
    dtype, itemsize = expected
    found = read_index(write(path, value("a", [3, 2], kind, bytes(range(6 * itemsize)))))["a"]
    assert (found.dtype, found.shape) == (dtype, (3, 2))
    assert content(path, found) == bytes(range(6 * itemsize))


def test_tensors_come_in_file_order(path: Path) -> None:
    raw = b"".join(value(tag, [1], "Int8", tag.encode()) for tag in "zab")
    assert list(read_index(write(path, raw))) == ["z", "a", "b"]


@pytest.mark.parametrize(
    ("dims", "data", "shape"),
    [
        ([], b"1234", ()),
        ([0], b"1234", ()),
        ([0], b"", (0,)),
        ([1], b"1234", (1,)),
        ([2, 0], b"", (2, 0)),
        (varint(1) + varint(1), b"1234", (1, 1)),
        (b"", b"1234", ()),
        (b"\x81\x00", b"1234", (1,)),  # a number in more bytes than it needs
    ],
)
def test_scalars_empty_tensors_and_packed_dims(
    path: Path, dims: list[int] | bytes, data: bytes, shape: tuple[int, ...]
) -> None:
    found = read_index(write(path, value("a", dims, "Float32", data)))["a"]
    assert found.shape == shape
    assert content(path, found) == data


def test_dims_may_be_packed_in_parts_and_fields_in_any_order(path: Path) -> None:
    parts = field(3, bytes(6)) + field(1, varint(3)) + field(2, b"Int8") + field(1, 2)
    raw = field(1, field(2, parts) + field(1, "größe".encode()))
    assert read_index(write(path, raw))["größe"].shape == (3, 2)


def test_consecutive_values_of_one_tag_are_one_tensor(path: Path) -> None:
    pieces = [value("a", [2, 3], "Int16", piece) for piece in (b"0123", b"456", b"789ab")]
    found = read_index(write(path, value("x", [1], "Int8", b"x") + b"".join(pieces) + value("y", [1], "Int8", b"y")))
    assert found["a"].shape == (2, 3)
    assert [length for _, length in found["a"].chunks] == [4, 3, 5]
    assert content(path, found["a"]) == b"0123456789ab"
    assert list(found) == ["x", "a", "y"]


def test_several_values_in_one_message_are_read(path: Path) -> None:
    # Concatenated messages and one message of all values are the same bytes; an empty message adds none.
    assert list(read_index(write(path, value("a", [1], "Int8", b"a") + b"" + value("b", [1], "Int8", b"b")))) == [
        "a",
        "b",
    ]


def test_texts_are_told_from_tensors(path: Path) -> None:
    text = "Größe".encode("utf-32-le")
    found = read_index(write(path, value("note", [0], "str", text)))["note"]
    assert (found.dtype, found.shape) == ("str", ())
    assert content(path, found).decode("utf-32-le") == "Größe"


def test_a_checksum_is_no_tensor_and_is_verified(path: Path) -> None:
    raw = value("a", [3], "Int8", b"abc")
    assert verify_checksum(write(path, raw)) is None
    write(path, raw + crc_trailer(raw))
    assert verify_checksum(path) is True
    assert list(read_index(path)) == ["a"]
    write(path, raw.replace(b"abc", b"abd") + crc_trailer(raw))
    assert verify_checksum(path) is False
    write(path, raw + crc_trailer(raw)[:-10] + b"\1" + crc_trailer(raw)[-9:])
    assert verify_checksum(path) is False


def test_a_checksum_over_more_than_one_read(path: Path) -> None:
    raw = value("a", [3_000_000], "Int8", bytes(range(250)) * 12_000)
    assert verify_checksum(write(path, raw + crc_trailer(raw))) is True


# What is refused

GOOD = value("good", [1], "Int8", b"g")
A = field(1, b"a")
TENSOR = field(2, tensor([1], "Int8", b"x"))


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "holds no tensor"),
        (b"\x0a", "byte 1 begins no number"),
        (b"\x0a\x80", "byte 1 begins no number"),
        (b"\x0a" + b"\xff" * 9 + b"\x02" + bytes(20), "byte 1 begins no number of 64 bits"),
        (b"\x0a" + b"\xff" * 10 + bytes(20), "byte 1 begins no number of 64 bits"),
        (b"\x0a" + b"\xff" * 9 + b"\x01", f"field 1 would have {2**64 - 1} bytes, 0 are left; is the file truncated"),
        (GOOD[:-1], r"field 1 would have \d+ bytes, \d+ are left"),
        (field(2, b""), "a checkpoint has no field 2; no MindSpore checkpoint"),
        (field(1, 7), "field 1 of a checkpoint is a number, bytes are due"),
        (b"\x0b\x0b\x0b\x0b\x0c\x0c\x0c\x0c", "field 1 is of wire type 3"),
        (b"\x0d\0\0\0\0", "field 1 is of wire type 5"),
        (b"\x0f", "field 1 is of wire type 7"),
        (field(0, b""), "a checkpoint has no field 0"),
        (field(1, TENSOR), "the value at byte 2: it has no name"),
        (field(1, A), "tensor a: it has no tensor"),
        (field(1, A + A + TENSOR), "tensor a: its name stands twice"),
        (field(1, A + TENSOR + TENSOR), "tensor a: its tensor stands twice"),
        (field(1, field(1, 5) + TENSOR), "field 1 of a value is a number"),
        (field(1, A + TENSOR + field(4, b"")), "tensor a: a value has no field 4"),
        (field(1, A + TENSOR + field(0, b"")), "tensor a: a value has no field 0"),
        (field(1, A + field(3, field(1, tensor([1], "Int8", b"x")))), "a is a map tensor"),
        (field(1, field(1, b"\xff") + TENSOR), "its name is not UTF-8"),
        (field(1, field(1, b"") + TENSOR), "its name '' cannot be printed"),
        (field(1, field(1, b"a\0") + TENSOR), r"its name 'a\\x00' cannot be printed"),
        (field(1, field(1, b"a" * 70_000) + TENSOR), "its name has 70000 bytes"),
        (field(1, A + field(2, field(2, b"Int8") + field(3, 5))), "tensor a: field 3 of a tensor is a number"),
        (field(1, A + field(2, field(2, b"Int8"))), "tensor a: it has no tensor_content"),
        (field(1, A + field(2, field(3, b"x"))), "tensor a: it has no tensor_type"),
        (field(1, A + field(2, tensor([1], "Int8", b"x") + field(3, b"y"))), "tensor a: field 3 of it stands twice"),
        (field(1, A + field(2, tensor([1], "Int8", b"x") + field(4, b"y"))), "tensor a: a tensor has no field 4"),
        (value("a", [2**64 - 1], "Int8", b"x"), "tensor a: one of its dims is negative"),
        (value("a", [2**62, 4], "Int8", b""), r"tensor a: shape \[\d+, 4\] is larger than any tensor"),
        (value("a", [0, 2**62, 4], "Int8", b""), "tensor a: shape .* is larger than any tensor"),
        (value("a", [1] * 65, "Int8", b"x"), "tensor a: it has more than 64 dims"),
        (value("a", b"\1" * 5000, "Int8", b"x"), "tensor a: it has more than 64 dims"),
        (value("a", b"\x80", "Int8", b"x"), "tensor a: byte .* begins no number"),
        (value("a", [1], "Int4", b"x"), "tensor a: tensor_type 'Int4' is not known; known: Float64"),
        (value("a", [1], "I" * 100, b"x"), "tensor a: its tensor_type has 100 bytes"),
        (value("a", [2], "Int16", b"xyz"), r"tensor a: int16 of shape \[2\] takes 4 bytes, the file has 3"),
        (value("a", [2], "Int16", b"xyzzy"), "tensor a: int16 .* takes 4 bytes, the file has 5"),
        (value("a", [], "Int16", b"xyzz"), r"tensor a: int16 of shape \[\] takes 2 bytes, the file has 4"),
        (value("a", [0], "str", b"xyz"), "tensor a: 3 bytes are no text in UTF-32"),
        (value("a", [2], "Int8", b"x") + GOOD, r"tensor a: int8 of shape \[2\] takes 2 bytes, the file has 1"),
        (GOOD + GOOD, "tensor good: it stands in the file twice, one after the other"),
        (GOOD + value("a", [1], "Int8", b"x") + GOOD, "tensor good: it stands in the file twice"),
        (value("a", [2], "Int8", b"x") + value("a", [1, 2], "Int8", b"y"), r"its parts are int8 of shape \[2\] and"),
        (
            value("a", [2], "Int8", b"x") + value("a", [2], "UInt8", b"y"),
            r"its parts are int8 of shape \[2\] and uint8",
        ),
        (value("a", [2], "Int8", b"x") + value("a", [2], "Int8", b"yz"), "takes 2 bytes, the file has 3"),
        (value("a", [2], "Int8", b"x") + value("a", [2], "Int8", b""), "tensor a: it stands in the file twice"),
        (value("a", [0], "Int8", b"") * 2, "tensor a: it stands in the file twice"),
        ((0x7F3A5ED8).to_bytes(4, "little") + bytes(40), "is encrypted"),
        ((0x7F3A5EDA).to_bytes(4, "little") + bytes(40), "is encrypted"),
        (b"PK\3\4" + bytes(40), "no MindSpore checkpoint, or a damaged one"),
    ],
)
def test_files_that_break_the_format(path: Path, raw: bytes, fault: str) -> None:
    with pytest.raises(WeightsError, match=fault) as caught:
        read_index(write(path, raw))
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for read in (read_index, verify_checksum):
        with pytest.raises(WeightsError, match=r"gone\.ckpt: cannot be read: No such file"):
            read(tmp_path / "gone.ckpt")
        with pytest.raises(WeightsError, match="cannot be read"):
            read(tmp_path)


# What is written

WRITTEN = {"float32": "Float32", "bfloat16": "BFloat16", "int8": "Int8", "bool": "Bool", "uint16": "UInt16"}


def written(*tensors: tuple[str, str, tuple[int, ...], list[Any]], checksum: bool = False) -> bytes:
    file = io.BytesIO()
    writer = CheckpointWriter(file, checksum=checksum)
    for name, dtype, shape, data in tensors:
        writer.add(name, dtype, shape, data)
    writer.finish()
    return file.getvalue()


def test_the_file_written_down_byte_by_byte_is_written() -> None:
    assert written(("w", "float16", (2, 1), [b"\1\2\3\4"])) == KNOWN


@given(
    tensors=st.dictionaries(
        st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=5),
        st.tuples(st.sampled_from(sorted(WRITTEN)), st.lists(st.integers(0, 4), max_size=3).map(tuple), st.randoms()),
        min_size=1,
        max_size=4,
    ),
    checksum=st.booleans(),
)
def test_what_is_written_is_what_the_format_says(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any], checksum: bool
) -> None:
    path = tmp_path_factory.mktemp("written") / "model.ckpt"
    itemsizes = dict(TENSOR_TYPES.values())
    raw, arguments, expected = b"", [], {}
    for name, (dtype, shape, random) in tensors.items():
        data = random.randbytes(math.prod(shape) * itemsizes[dtype])
        cuts = sorted(random.randint(0, len(data)) for _ in range(3))
        pieces = [memoryview(data)[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        arguments.append((name, dtype, shape, pieces))
        raw += value(name, list(shape or (0,)), WRITTEN[dtype], data)
        expected[name] = (dtype, shape, data)
    write(path, written(*arguments, checksum=checksum))
    assert path.read_bytes() == raw + (crc_trailer(raw) if checksum else b"")
    assert verify_checksum(path) is (True if checksum else None)
    found = read_index(path)
    assert {name: (t.dtype, t.shape, content(path, t)) for name, t in found.items()} == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize(("size", "chunks"), [(15, [15]), (16, [16]), (17, [16, 1]), (48, [16, 16, 16])])
def test_large_tensors_are_split(path: Path, monkeypatch: pytest.MonkeyPatch, size: int, chunks: list[int]) -> None:
    monkeypatch.setattr(mindspore, "MAX_CONTENT_BYTES", 16)
    data, raw = bytes(range(size)), b""
    for start in range(0, size, 16):
        raw += value("a", [size], "Int8", data[start : start + 16])
    assert written(("a", "int8", (size,), [data[:5], data[5:]])) == raw
    found = read_index(write(path, raw))["a"]
    assert [length for _, length in found.chunks] == chunks
    assert content(path, found) == data


class SparseFile(io.BufferedRandom):
    """Leaves a hole where a whole piece of zeros is written."""

    def write(self, data: Any, /) -> int:
        if len(data) < 1 << 20:
            return super().write(data)
        self.seek(len(data), 1)
        return len(data)


def test_a_tensor_of_more_than_the_limit_takes_two_values_and_no_memory(path: Path) -> None:
    zeros = bytes(1 << 20)
    size = MAX_CONTENT_BYTES + (3 << 20)
    tracemalloc.start()
    try:
        with SparseFile(open(path, "w+b", buffering=0)) as file:  # noqa: PTH123
            writer = CheckpointWriter(file)
            writer.add("large", "uint8", (size,), (zeros for _ in range(size >> 20)))
            writer.add("small", "int8", (3,), [b"end"])
            writer.finish()
        found = read_index(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert [length for _, length in found["large"].chunks] == [512 << 20, 3 << 20]
    offset, length = found["small"].chunks[0]
    with path.open("rb") as read:
        read.seek(offset)
        assert read.read(length) == b"end"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("a", "float8_e4m3fn", (1,), [b"x"]), "holds no float8_e4m3fn; it holds float64, float32"),
        (("a", "int16", (2,), [b"xyz"]), "tensor a: its shape takes 4 bytes, data has 3"),
        (("a", "int16", (2,), [b"xyzz", b"", b"y"]), "tensor a: its shape takes 4 bytes, data has more"),
        (("a", "int16", (2,), [b"xyzzy"]), "tensor a: its shape takes 4 bytes, data has more"),
        (("a", "int16", (0,), [b"x"]), "tensor a: its shape takes 0 bytes, data has more"),
        (("a", "int16", (-1,), []), r"tensor a: shape \[-1\]"),
        (("a", "int16", (1,) * 65, [b"xy"]), "at most 64 sizes"),
        (("", "int8", (1,), [b"x"]), "'' is no tensor name"),
        (("a\n", "int8", (1,), [b"x"]), r"'a\\n' is no tensor name"),
        (("good", "int8", (1,), [b"x"]), "tensor good cannot be written twice"),
    ],
)
def test_tensors_that_cannot_be_written(arguments: Any, fault: str) -> None:
    with pytest.raises(WeightsError, match=fault):
        written(("good", "int8", (1,), [b"g"]), arguments)


def broken() -> Iterator[bytes]:
    yield b"x"
    raise OSError("the disk is gone")


def test_nothing_is_finished_after_a_fault(path: Path) -> None:
    file = io.BytesIO()
    writer = CheckpointWriter(file)
    with pytest.raises(OSError, match="the disk is gone"):
        writer.add("a", "int8", (2,), broken())
    for attempt in (writer.finish, lambda: writer.add("b", "int8", (1,), [b"b"])):
        with pytest.raises(WeightsError, match="tensor a was not written to its end"):
            attempt()
    with pytest.raises(WeightsError, match="truncated"):
        read_index(write(path, file.getvalue()))


class FullFile(io.BytesIO):
    """A disk with room for so many bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_an_error_wherever_it_comes() -> None:
    tensors = [("a", "int8", (3,), [b"abc"]), ("b", "int8", (1,), [b"b"])]
    whole = len(written(*tensors, checksum=True))  # type: ignore[arg-type]
    finished = []
    for room in range(whole + 1):
        writer = CheckpointWriter(FullFile(room), checksum=True)
        try:
            for arguments in tensors:
                writer.add(*arguments)  # type: ignore[arg-type]
            writer.finish()
            finished.append(room)
        except OSError:
            with pytest.raises(WeightsError):
                writer.finish()
    assert finished == [whole]


def test_a_finished_checkpoint_takes_nothing_more() -> None:
    writer = CheckpointWriter(io.BytesIO())
    writer.finish()
    with pytest.raises(WeightsError, match="the checkpoint is finished"):
        writer.add("a", "int8", (1,), [b"a"])


# Properties

VALID = (
    value("layer.weight", [2, 3], "Float32", bytes(range(24)))
    + value("split", [4], "Int16", b"0123")
    + value("split", [4], "Int16", b"4567")
    + value("scalar", [0], "BFloat16", b"xy")
    + value("text", [0], "str", "hi".encode("utf-32-le"))
)


def check_read(path: Path) -> None:
    """Reading ends in WeightsError or in an index that the file can keep, and takes little memory."""
    size = path.stat().st_size
    itemsizes = {**dict(TENSOR_TYPES.values()), "str": 1}
    tracemalloc.start()
    try:
        index = read_index(path)
    except WeightsError:
        index = {}
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 << 20
    places = [chunk for found in index.values() for chunk in found.chunks]
    assert all(0 <= offset <= offset + length <= size for offset, length in places)
    assert all(end[0] >= sum(begin) for begin, end in itertools.pairwise(places))
    for found in index.values():
        if found.dtype != "str":
            assert sum(length for _, length in found.chunks) == math.prod(found.shape) * itemsizes[found.dtype]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "model.ckpt"


@given(raw=st.binary(max_size=80))
def test_random_files_raise_weights_errors_alone(scratch: Path, raw: bytes) -> None:
    check_read(write(scratch, raw))
    verify_checksum(scratch)


@given(
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=3), st.integers(0, 3)), max_size=4),
    stop=st.integers(0, len(VALID)) | st.none(),
)
def test_mutated_files_raise_weights_errors_alone(
    scratch: Path, edits: list[tuple[int, bytes, int]], stop: int | None
) -> None:
    raw = bytearray(VALID)
    for position, replacement, length in edits:
        raw[position : position + length] = replacement
    check_read(write(scratch, bytes(raw[:stop])))


NUMBER = st.integers(0, 3) | st.integers(0, 2**64 - 1)
PARTS = st.recursive(
    st.builds(
        field, st.integers(0, 4), NUMBER | st.binary(max_size=6) | st.sampled_from([b"Int8", b"Float32", b"str"])
    ),
    lambda inner: st.builds(lambda number, parts: field(number, b"".join(parts)), st.integers(1, 3), st.lists(inner)),
    max_leaves=12,
)


@given(parts=st.lists(PARTS, max_size=4))
def test_messages_of_any_structure_raise_weights_errors_alone(scratch: Path, parts: list[bytes]) -> None:
    check_read(write(scratch, b"".join(parts)))


def test_messages_nested_deep_are_refused_at_once(path: Path) -> None:
    raw = b""
    for _ in range(3000):
        raw = field(1, raw)
    with pytest.raises(WeightsError):
        read_index(write(path, raw))


def test_the_unmutated_file_is_taken(path: Path) -> None:
    assert {name: found.shape for name, found in read_index(write(path, VALID)).items()} == {
        "layer.weight": (2, 3),
        "split": (4,),
        "scalar": (),
        "text": (),
    }


# MindSpore's definition, through protobuf's own library


def message_class() -> Any:
    pb = pytest.importorskip("google.protobuf.descriptor_pb2", reason="protobuf is not installed")
    from google.protobuf import descriptor_pool, message_factory

    one, required, repeated = 1, 2, 3
    kinds = {"int64": 3, "string": 9, "message": 11, "bytes": 12}
    layout = {
        "Checkpoint": [("value", 1, repeated, "message", ".Value")],
        "Value": [
            ("tag", 1, required, "string", ""),
            ("tensor", 2, one, "message", ".TensorProto"),
            ("maptensor", 3, one, "message", ".MapTensorProto"),
        ],
        "TensorProto": [
            ("dims", 1, repeated, "int64", ""),
            ("tensor_type", 2, required, "string", ""),
            ("tensor_content", 3, required, "bytes", ""),
        ],
        "MapTensorProto": [("tensor", 1, repeated, "message", ".TensorProto")],
    }
    file = pb.FileDescriptorProto(name="checkpoint.proto", syntax="proto2")
    for name, fields in layout.items():
        message = file.message_type.add(name=name)
        for part, number, label, kind, type_name in fields:
            message.field.add(name=part, number=number, label=label, type=kinds[kind], type_name=type_name or None)
        if name == "Value":
            message.oneof_decl.add(name="value")
            for part in message.field[1:]:
                part.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Checkpoint"))


def test_protobuf_reads_what_is_written_and_writes_what_is_read(path: Path) -> None:
    checkpoint = message_class()()
    raw = written(("a", "float32", (1, 2), [b"01234567"]), ("größe", "bool", (), [b"\1"]), checksum=True)
    checkpoint.ParseFromString(raw[:-17])
    assert [(v.tag, list(v.tensor.dims), v.tensor.tensor_type, v.tensor.tensor_content) for v in checkpoint.value] == [
        ("a", [1, 2], "Float32", b"01234567"),
        ("größe", [0], "Bool", b"\1"),
    ]
    assert checkpoint.SerializeToString() == raw[:-17]
    checkpoint.value[0].tag = "b"
    found = read_index(write(path, checkpoint.SerializeToString()))
    assert [(t.name, t.dtype, t.shape, content(path, t)) for t in found.values()] == [
        ("b", "float32", (1, 2), b"01234567"),
        ("größe", "bool", (), b"\1"),
    ]


@given(edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=2), st.integers(0, 2)), max_size=2))
def test_what_is_taken_is_what_protobuf_takes(scratch: Path, edits: list[tuple[int, bytes, int]]) -> None:
    raw = bytearray(VALID)
    for position, replacement, length in edits:
        raw[position : position + length] = replacement
    checkpoint = message_class()()
    try:
        index = read_index(write(scratch, bytes(raw)))
    except WeightsError:
        return
    checkpoint.ParseFromString(bytes(raw))
    expected: dict[str, bytes] = {}
    for part in checkpoint.value:
        expected[part.tag] = expected.get(part.tag, b"") + part.tensor.tensor_content
    assert {name: content(scratch, found) for name, found in index.items()} == expected
