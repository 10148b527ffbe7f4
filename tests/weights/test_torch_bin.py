from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights import torch_bin
from npu_zoo.weights.torch_bin import INDEX_FILE, ITEMSIZES, SINGLE_FILE, read_index, read_tensor, read_weight_map


def load(path: Path) -> dict[str, Tensor]:
    return {name: read_tensor(path, entry) for name, entry in read_index(path).items()}


def save(path: Path, state: Any, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


def assert_equal(found: dict[str, Tensor], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].stride() == torch.empty(tensor.shape).stride()
        assert same_bytes(found[name], tensor)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    a, b = (tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1) for tensor in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.bin"


# An assembler of pickles: what a hostile one may hold, opcode by opcode.


@dataclass(frozen=True)
class Name:
    module: str
    name: str


@dataclass(frozen=True)
class Reduce:
    function: Any
    arguments: Any


@dataclass(frozen=True)
class External:
    value: Any


def assemble(value: Any) -> bytes:
    match value:
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(assemble, value)) + b"t"
        case list():
            return b"](" + b"".join(map(assemble, value)) + b"e"
        case dict():
            return b"}(" + b"".join(assemble(key) + assemble(item) for key, item in value.items()) + b"u"
        case Name(module, name):
            return f"c{module}\n{name}\n".encode()
        case Reduce(function, arguments):
            return assemble(function) + assemble(arguments) + b"R"
        case External(inner):
            return assemble(inner) + b"Q"
    raise TypeError(type(value))


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + assemble(value) + b"."


REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
REBUILD_V3 = Name("torch._utils", "_rebuild_tensor_v3")
FLOAT = Name("torch", "FloatStorage")
UNTYPED = Name("torch.storage", "UntypedStorage")
ODICT = Name("collections", "OrderedDict")


def storage(kind: Any = FLOAT, key: Any = "0", size: Any = 6) -> External:
    return External(("storage", kind, key, "cpu", size))


def rebuilt(
    of: Any = None, offset: Any = 0, shape: Any = (2, 3), strides: Any = (3, 1), more: tuple[Any, ...] = ()
) -> Reduce:
    return Reduce(REBUILD, (storage() if of is None else of, offset, shape, strides, False, Reduce(ODICT, ()), *more))


FLOATS = struct.pack("<6f", *range(6))


def archive(
    path: Path, pickle: bytes, members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, raw in {"data.pkl": pickle, "version": b"3\n", "data/0": FLOATS, **(members or {})}.items():
            file.writestr(f"archive/{name}", raw)
    return path


# What is read


@pytest.mark.parametrize("dtype", ITEMSIZES)
def test_every_dtype_is_read_as_torch_reads_it(path: Path, dtype: str) -> None:
    raw = torch.arange(24 * ITEMSIZES[dtype], dtype=torch.uint8)
    kind = getattr(torch, dtype)
    tensor = (raw > 11) if kind is torch.bool else raw.view(kind)
    state = {"a": tensor.reshape(2, 3, 4), "empty": tensor[:0].clone(), "scalar": tensor[3].clone()}
    assert_equal(load(save(path, state)), torch.load(path, weights_only=True))
    assert {name: entry.dtype for name, entry in read_index(path).items()} == dict.fromkeys(state, dtype)


def test_modules_with_their_metadata_and_parameters_are_read(path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert_equal(load(save(path, module.state_dict())), torch.load(path, weights_only=True))
    assert_equal(load(save(path, dict(module.named_parameters()))), torch.load(path, weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_is_read(path: Path, protocol: int) -> None:
    state = OrderedDict(a=torch.randn(3), b=torch.randn(2, 2), **{"long" * 80: torch.ones(1, dtype=torch.uint16)})
    save(path, state, pickle_protocol=protocol)
    assert_equal(load(path), state)


def test_tied_tensors_are_read_for_both_names(path: Path) -> None:
    shared = torch.randn(4, 3)
    found = read_index(save(path, {"embed": shared, "head": shared, "tail": shared[1:]}))
    assert found["embed"].storage == found["head"].storage == found["tail"].storage
    assert found["tail"].storage_offset == 3
    assert_equal(load(path), {"embed": shared, "head": shared, "tail": shared[1:]})


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[:, 1:3],
        lambda t: t[1::2, ::3],
        lambda t: t[0],
        lambda t: t[2, 3],
        lambda t: t[:0, 1:],
        lambda t: t.reshape(2, 2, 5).permute(2, 0, 1),
        lambda t: t[:, :1].expand(4, 1),
    ],
)
def test_views_are_read_contiguous(path: Path, view: Any) -> None:
    tensor = view(torch.arange(20, dtype=torch.bfloat16).reshape(4, 5))
    assert_equal(load(save(path, {"view": tensor})), {"view": tensor})


def test_index_places_are_places_in_the_file(path: Path) -> None:
    state = {"a": torch.arange(5), "b": torch.arange(7, dtype=torch.int16)}
    raw = save(path, state).read_bytes()
    for name, entry in read_index(path).items():
        assert raw[entry.offset : entry.offset + entry.nbytes] == state[name].numpy().tobytes()
        assert entry.storage.split("/")[1] == "data"


def test_unaligned_storages_are_read(path: Path) -> None:
    for filler in range(9):
        found = read_index(archive(path, pickled({"a": rebuilt()}), {"data/0": FLOATS, "data.x": b"x" * filler}))
        assert torch.equal(read_tensor(path, found["a"]), torch.arange(6.0).reshape(2, 3))


def test_files_without_crcs_and_with_the_64_bit_fields_of_large_ones_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    archive(path, pickled({"a": rebuilt()}))
    monkeypatch.undo()
    raw = bytearray(path.read_bytes())
    assert b"PK\6\6" in raw
    for position in (14, raw.index(b"PK\1\2") + 16):
        raw[position : position + 4] = b"\0\0\0\0"
    path.write_bytes(raw)
    assert_equal(load(path), {"a": torch.arange(6.0).reshape(2, 3)})


def test_an_ordered_dict_of_pairs_is_read(path: Path) -> None:
    archive(path, pickled(Reduce(ODICT, ([["a", rebuilt()], ("b", rebuilt())],))))
    assert list(read_index(path)) == ["a", "b"]


def test_the_index_is_read_without_torch(tmp_path: Path) -> None:
    save(tmp_path / SINGLE_FILE, {"a": torch.ones(2)})
    program = (
        "import sys, pathlib; import npu_zoo.weights.mindspore; from npu_zoo.weights import torch_bin as t; "
        "print(t.read_weight_map(pathlib.Path(sys.argv[1])), sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{{'a': '{SINGLE_FILE}'}} []"


# Code is never run


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_not_executed(path: Path, tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "executed"
    save(path, {"a": torch.ones(1), "b": Malicious(marker)}, pickle_protocol=protocol)
    with pytest.raises(WeightsError, match=r"holds code \(\w+\.system\) beside tensors; it was not executed"):
        read_index(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "FloatStorage.from_file"),
        ("torch ", "FloatStorage"),
        ("torch", r"Float\x53torage"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "__builtins__"),
        ("collections", "Counter"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("__torch__", "Model"),
        ("torch.storage", "TypedStorage"),
    ],
)
def test_names_that_no_state_dict_needs_are_refused(path: Path, module: str, name: str) -> None:
    for where in ({"a": Name(module, name)}, {"a": Reduce(Name(module, name), ())}, Name(module, name)):
        archive(path, pickled(where))
        with pytest.raises(WeightsError, match="holds code") as caught:
            read_index(path)
        assert f"({module}.{name})" in str(caught.value).replace("\\\\", "\\")
        assert str(path) in str(caught.value)


# What is refused


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        (
            {"state_dict": {"w": torch.ones(1), "v": torch.ones(1)}, "epoch": 3},
            "its keys are 'state_dict', 'epoch', and ",
        ),
        ({"model": {"w": torch.ones(1)}}, "'model' is a dict of its own, of 'w'; save the dict of tensors alone"),
        ({"module": {}}, "'module' is a dict of its own, of nothing"),
        ({"w": torch.ones(1), "step": 3}, "'step' is a int; a tensor with a name is due"),
        ({"w": [torch.ones(1)]}, "'w' is a list"),
        ({0: torch.ones(1)}, "0 is a tensor; a tensor with a name is due"),
        ([torch.ones(1)], "holds a list, a state dict is due"),
        (torch.ones(1), "holds a tensor, a state dict is due"),
        (None, "holds a NoneType"),
        ({"a\n": torch.ones(1)}, r"the tensor name 'a\\n' cannot be printed"),
        ({"": torch.ones(1)}, "the tensor name '' cannot be printed"),
        ({"c": torch.ones(1, dtype=torch.complex64)}, r"holds code \(torch\.ComplexFloatStorage\)"),
        ({"n": torch.ones(1, dtype=torch.complex64).conj().imag}, "holds code|more than its bytes"),
        ({"s": torch.eye(2).to_sparse()}, r"holds code \(torch\._utils\._rebuild_sparse_tensor\)"),
    ],
)
def test_files_that_hold_no_flat_state_dict(path: Path, state: Any, fault: str) -> None:
    with pytest.raises(WeightsError, match=fault) as caught:
        read_index(save(path, state))
    assert str(path) in str(caught.value)


def test_a_tensor_with_its_negative_bit_set_is_refused(path: Path) -> None:
    negated = torch._neg_view(torch.ones(2))
    with pytest.raises(WeightsError, match="more than its bytes: it has metadata"):
        read_index(save(path, {"a": negated}))
    assert_equal(load(save(path, {"a": negated.resolve_neg()})), {"a": -torch.ones(2)})


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (rebuilt(shape=(2, 4), strides=(4, 1)), r"shape \[2, 4\] has more elements than its storage, which has 6"),
        (rebuilt(shape=(10**12,), strides=(0,)), "has more elements than its storage"),
        (rebuilt(offset=1), r"shape \[2, 3\] with strides \[3, 1\] from element 1 on lies outside its storage of 6"),
        (rebuilt(strides=(4, 1)), "lies outside its storage of 6"),
        (rebuilt(shape=(0, 2**62, 2**62), strides=(1, 1, 1)), "has more elements than its storage"),
        (rebuilt(offset=-1), "do not describe a tensor"),
        (rebuilt(offset="0"), "do not describe a tensor"),
        (rebuilt(offset=True), "do not describe a tensor"),
        (rebuilt(shape=(-2, -3)), "its shape and strides are no tuples of sizes"),
        (rebuilt(strides=(-3, 1)), "its shape and strides are no tuples of sizes"),
        (rebuilt(shape=(2.0, 3)), "its shape and strides are no tuples of sizes"),
        (rebuilt(shape=[2, 3]), "its shape and strides are no tuples of sizes"),
        (rebuilt(shape=(2**63, 3)), "its shape and strides are no tuples of sizes"),
        (rebuilt(shape=(1,) * 65, strides=(1,) * 65), "its shape and strides are no tuples of sizes"),
        (rebuilt(shape=(6,)), "1 sizes and 2 strides do not describe a tensor"),
        (rebuilt(storage(key="9")), "its storage archive/data/9 is not in the file"),
        (rebuilt(storage(key="../data.pkl")), "its storage archive/data/../data.pkl is not in the file"),
        (rebuilt(storage(key=0)), "its storage has no type, key and size"),
        (rebuilt(storage(size=7)), "its storage has 24 bytes, 7 elements of float32 are due"),
        (rebuilt(storage(size=2**62)), "its storage has 24 bytes"),
        (rebuilt(storage(size=-6)), "its storage has no type, key and size"),
        (rebuilt(storage(ODICT)), "its storage is a collections.OrderedDict"),
        (rebuilt(storage(Name("torch", "float32"))), "its storage is a torch.float32"),
        (rebuilt(storage("FloatStorage")), "its storage has no type, key and size"),
        (rebuilt(storage(UNTYPED, size=24)), "its storage of 24 bytes has no dtype that is known"),
        (rebuilt(External("storage")), "it has no storage"),
        (rebuilt(External(("storage", FLOAT))), "it has no storage"),
        (rebuilt(("storage", FLOAT, "0", "cpu", 6)), "it has no storage"),
        (
            Reduce(REBUILD_V3, (storage(UNTYPED, size=23), 0, (2,), (1,), False, None, Name("torch", "float32"))),
            "its storage of 23 bytes has no dtype that is known",
        ),
    ],
)
def test_tensors_that_are_none(path: Path, value: Any, fault: str) -> None:
    archive(path, pickled({"good": rebuilt(), "bad": value}))
    with pytest.raises(WeightsError, match=f"tensor bad: .*{fault}|tensor bad: {fault}"):
        read_index(path)


@pytest.mark.parametrize(
    ("pickle", "fault"),
    [
        (b"", "its data.pkl is no pickle of a state dict"),
        (b"\x80\x02}", "no pickle of a state dict"),
        (b".", "takes more from its stack than is there"),
        (b"(.", "takes more from its stack than is there"),
        (b"\xff.", "no pickle of a state dict"),
        (b"X\xff\xff\xff\xff.", "no pickle of a state dict"),
        (b"X\1\0\0\0\xff.", "no pickle of a state dict"),
        (b"t.", "looks for a mark that is not there"),
        (b"h\0.", "it recalls object 0, which it never kept"),
        (b"}}}s.", "a dict in it has a dict for a key"),
        (pickled({(): 1}), "a dict in it has a tuple for a key"),
        (b"}(X\1\0\0\0aNX\1\0\0\0aNu.", "has the key 'a' twice"),
        (b"}(Nu.", "sets items of a dict"),
        (b"](NNu.", "sets items of a list"),
        (b"}Na.", "appends to a dict"),
        (b"]}b.", "it gives a list a state"),
        (b"}Nb.", "it gives a dict a state"),
        (b"}}R.", "it calls a dict with a dict"),
        (pickled(Reduce(ODICT, (1,))), r"it calls collections\.OrderedDict with 1 arguments"),
        (pickled(Reduce(ODICT, ([1],))), "it makes an OrderedDict of what are no pairs"),
        (pickled(Reduce(REBUILD, ())), "with 0 arguments"),
        (pickled(Reduce(FLOAT, ())), r"it calls torch\.FloatStorage with 0 arguments"),
        (pickled({"a": rebuilt(more=({"neg": True},))}), "it has metadata"),
        (b"\x8b\xff\xff\xff\x7f.", r"opcode b'\\x8b' at byte 0 has no place in it"),
        (b"\x8a\x09" + b"\xff" * 8 + b"\x7f.", "a number in it has more than 64 bits"),
        (b"ctorch\n", "a name in it does not end"),
        (b"ctorch\n\xff\n.", "no pickle of a state dict"),
        (b"I1\n.", "opcode b'I' at byte 0 has no place in it"),
        (b"ios\nsystem\n(.", "opcode b'i' at byte 0 has no place in it"),
        (b"P0\n.", "opcode b'P' at byte 0 has no place in it"),
        (b"\x82\x01.", r"opcode b'\\x82' at byte 0 has no place in it"),
        (pickled(ODICT)[:-1] + b")\x81.", r"opcode b'\\x81' at byte 28 has no place in it"),
        (b"\x80\x04NN\x93.", "asks for a name that is no string"),
    ],
)
def test_pickles_that_are_none(path: Path, pickle: bytes, fault: str) -> None:
    with pytest.raises(WeightsError, match=fault) as caught:
        read_index(archive(path, pickle))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "pickle",
    [
        b"N" + b"\x85" * 50_000,
        b"N" + b"Q" * 50_000,
        b"]" * 50_000 + b"a" * 49_999,
        b"N" + b"q\0h\0\x86" * 50_000,  # a pair of the same, of pairs of the same: 2 ** 50_000 leaves
        b"}" + b"N" + b"\x85" * 50_000 + b"Ns",
    ],
    ids=["tuples", "identities", "lists", "pairs", "key"],
)
def test_objects_nested_deep_are_refused_without_recursion(path: Path, pickle: bytes) -> None:
    with pytest.raises(WeightsError, match=r"a state dict is due|a tuple for a key"):
        read_index(archive(path, pickle + b"."))


@pytest.mark.parametrize("claim", [b"}r\xff\xff\xff\xff", b"\x95" + b"\xff" * 7 + b"\x7f}"], ids=["memo", "frame"])
def test_sizes_that_a_pickle_claims_take_no_memory(path: Path, claim: bytes) -> None:
    assert check_read(archive(path, b"\x80\x04" + claim + b".")) == {}


def test_files_of_the_old_form_say_how_to_save_them_anew(path: Path) -> None:
    state = {"a": torch.randn(3)}
    save(path, state, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"saved by torch before 1\.6") as caught:
        read_index(path)
    command = str(caught.value).splitlines()[-1].split('"')[1]
    subprocess.run([sys.executable, "-c", command], check=True)
    assert_equal(load(path.with_name("weights.bin.new")), state)


def test_compressed_members_are_refused(path: Path) -> None:
    archive(path, pickled({"a": rebuilt()}), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"member archive/data\.pkl is compressed or encrypted"):
        read_index(path)


def test_big_endian_files_are_refused(path: Path) -> None:
    assert list(read_index(archive(path, pickled({"a": rebuilt()}), {"byteorder": b"little"}))) == ["a"]
    archive(path, pickled({"a": rebuilt()}), {"byteorder": b"big"})
    with pytest.raises(WeightsError, match="its byte order is b'big'; save it anew on a little-endian machine"):
        read_index(path)
    archive(path, pickled({"a": rebuilt()}), {"byteorder": b"little" * 10})
    with pytest.raises(WeightsError, match="a member of 60 bytes, where the limit is 16"):
        read_index(path)


def test_archives_of_something_else_are_refused(path: Path) -> None:
    for names in (["a.txt"], ["data.pkl"], ["x/y/data.pkl"], ["x/data.pkl", "y/data.pkl"]):
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, pickled({}))
        with pytest.raises(WeightsError, match=r"no file of torch\.save: it has \d members data\.pkl, one is due"):
            read_index(path)


def test_a_member_that_is_there_twice_is_refused(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with zipfile.ZipFile(path, "w") as file:
            for raw in (pickled({}), pickled({"a": rebuilt()})):
                file.writestr("archive/data.pkl", raw)
    with pytest.raises(WeightsError, match=r"member archive/data\.pkl is in the zip file twice"):
        read_index(path)


def directory_entry(raw: bytes, name: str) -> int:
    """Where the directory's entry of a member begins."""
    return raw.rindex(name.encode()) - 46


@pytest.mark.parametrize(
    ("field", "number", "fault"),
    [
        (42, 0, r"member archive/\S+ overlaps what is before it"),
        (42, 1, "member archive/data/0 overlaps what is before it"),
        (42, 2**31, "lies behind the end of the file"),
        (20, 2**20, "is compressed or encrypted"),
        (8, 1, "is compressed or encrypted"),
    ],
)
def test_directories_that_contradict_the_file(path: Path, field: int, number: int, fault: str) -> None:
    raw = bytearray(archive(path, pickled({"a": rebuilt()})).read_bytes())
    place = directory_entry(bytes(raw), "archive/data/0") + field
    width = 2 if field == 8 else 4
    raw[place : place + width] = number.to_bytes(width, "little")
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match=fault):
        read_index(path)


def test_a_member_that_claims_more_than_the_file_has_is_refused(path: Path) -> None:
    raw = bytearray(archive(path, pickled({"a": rebuilt()})).read_bytes())
    place = directory_entry(bytes(raw), "archive/data/0") + 20
    raw[place : place + 8] = (2**31).to_bytes(4, "little") * 2
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match=r"member archive/data/0 ends at byte \d+, after the members' end"):
        read_index(path)


def test_limits_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(path, pickled({"a": rebuilt()}))
    monkeypatch.setattr(torch_bin, "MAX_PICKLE_BYTES", 50)
    with pytest.raises(WeightsError, match=r"a member of \d+ bytes, where the limit is 50"):
        read_index(path)
    monkeypatch.setattr(torch_bin, "MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(WeightsError, match=r"a directory of \d+ bytes; the limit is 100"):
        read_index(path)


def test_files_that_are_truncated_or_cannot_be_opened(tmp_path: Path, path: Path) -> None:
    raw = save(path, {"a": torch.ones(20)}).read_bytes()
    entry = read_index(path)["a"]
    for stop in range(0, len(raw), 37):
        path.write_bytes(raw[:stop])
        with pytest.raises(WeightsError, match=r"no zip file of torch\.save, or a truncated one"):
            read_index(path)
    path.write_bytes(raw[: entry.offset + 10])
    with pytest.raises(WeightsError, match="tensor a: the file was truncated"):
        read_tensor(path, entry)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot be mapped"):
        read_tensor(path, entry)
    for unreadable in (tmp_path / "gone", tmp_path):
        with pytest.raises(WeightsError, match="cannot be read"):
            read_index(unreadable)


# Directories


def shards(directory: Path, weight_map: dict[str, str] | None = None) -> Path:
    contents = {f"pytorch_model-0000{n}-of-00002.bin": {f"t{n}": torch.ones(n)} for n in (1, 2)}
    directory.mkdir(exist_ok=True)
    for name, state in contents.items():
        save(directory / name, state)
    weight_map = weight_map or {tensor: name for name, state in contents.items() for tensor in state}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    return directory


SHARDS = {"t1": "pytorch_model-00001-of-00002.bin", "t2": "pytorch_model-00002-of-00002.bin"}


def test_a_single_file_wins_then_the_index_then_the_names(tmp_path: Path) -> None:
    shards(tmp_path)
    save(tmp_path / "training_args.bin", {"unrelated": torch.ones(1)})
    assert read_weight_map(tmp_path) == SHARDS
    (tmp_path / INDEX_FILE).unlink()
    assert read_weight_map(tmp_path) == SHARDS
    save(tmp_path / SINGLE_FILE, {"merged": torch.ones(1)})
    assert read_weight_map(tmp_path) == {"merged": SINGLE_FILE}


def test_missing_shards_are_named(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / SHARDS["t2"]).unlink()
    with pytest.raises(WeightsError, match=r"shard 'pytorch_model-00002-of-00002\.bin' is missing"):
        read_weight_map(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(WeightsError, match=r"shard pytorch_model-00002-of-00002\.bin is missing"):
        read_weight_map(tmp_path)
    (tmp_path / SHARDS["t1"]).unlink()
    with pytest.raises(WeightsError, match=r"holds no pytorch_model-\*-of-\*\.bin file"):
        read_weight_map(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "fault"),
    [
        (SHARDS | {"lost": SHARDS["t1"]}, "lost is not in pytorch_model-00001"),
        ({"t1": SHARDS["t1"]} | {"x": SHARDS["t2"]}, "t2 is in pytorch_model-00002-of-00002.bin and not in the index"),
        ({"t1": "../outside.bin"}, "link out of the directory"),
        ({"t1": 3}, "weight_map does not map"),
    ],
)
def test_an_index_that_contradicts_its_shards(tmp_path: Path, weight_map: dict[str, Any], fault: str) -> None:
    save(tmp_path / "outside.bin", {"t1": torch.ones(1)})
    with pytest.raises(WeightsError, match=fault):
        read_weight_map(shards(tmp_path / "checkpoint", weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    shutil.copy(tmp_path / SHARDS["t1"], tmp_path / SHARDS["t2"])
    with pytest.raises(WeightsError, match=r"tensor t1 is in .*00001.* and again in .*00002"):
        read_weight_map(tmp_path)


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "outside.bin", {"a": torch.ones(1)})
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / SINGLE_FILE).symlink_to(tmp_path / "outside.bin")
    with pytest.raises(WeightsError, match="link out of the directory"):
        read_weight_map(tmp_path / "checkpoint")


# Properties


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "weights.bin"


def check_read(path: Path) -> dict[str, Tensor]:
    """Reading ends in WeightsError or in tensors that the file can keep, and takes little memory."""
    tracemalloc.start()
    try:
        index = read_index(path)
    except WeightsError:
        index = {}
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20
    size = path.stat().st_size
    assert all(entry.offset + entry.nbytes <= size for entry in index.values())
    return {name: read_tensor(path, entry) for name, entry in index.items()}


def assert_as_torch(path: Path, found: dict[str, Tensor]) -> None:
    """What torch reads, where it reads the file at all."""
    try:
        expected = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert same_bytes(tensor, expected[name])


def valid_file() -> bytes:
    file = io.BytesIO()
    shared = torch.arange(6.0)
    torch.save(OrderedDict(a=shared, b=shared.reshape(2, 3).t(), c=torch.ones(3, dtype=torch.float8_e5m2)), file)
    return file.getvalue()


VALID = valid_file()
PICKLE = zipfile.ZipFile(io.BytesIO(VALID)).read("archive/data.pkl")
DIRECTORY = VALID.index(b"PK\1\2")
BYTES = {"0": FLOATS, "1": torch.ones(3, dtype=torch.float8_e5m2).view(torch.uint8).numpy().tobytes()}
EDITS = st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4)


def mutated(raw: bytes, edits: list[tuple[int, bytes, int]], start: int = 0) -> bytes:
    changed = bytearray(raw)
    for position, replacement, length in edits:
        place = start + position % (len(raw) - start)
        changed[place : place + length] = replacement
    return bytes(changed)


@given(raw=st.binary(max_size=100))
def test_random_files_raise_weights_errors_alone(scratch: Path, raw: bytes) -> None:
    scratch.write_bytes(raw)
    assert check_read(scratch) == {}


@given(edits=EDITS, where=st.sampled_from([0, DIRECTORY]), inserted=st.booleans())
def test_mutated_files_raise_weights_errors_alone(
    scratch: Path, edits: list[tuple[int, bytes, int]], where: int, inserted: bool
) -> None:
    if not inserted:
        edits = [(position, replacement, len(replacement)) for position, replacement, _ in edits]
    scratch.write_bytes(mutated(VALID, edits, where))
    check_read(scratch)


@given(edits=EDITS)
def test_mutated_pickles_give_what_torch_gives(scratch: Path, edits: list[tuple[int, bytes, int]]) -> None:
    archive(scratch, mutated(PICKLE, edits), {f"data/{key}": raw for key, raw in BYTES.items()})
    assert_as_torch(scratch, check_read(scratch))


@given(opcodes=st.lists(st.integers(0, 255), max_size=40))
def test_pickles_of_any_opcodes_raise_weights_errors_alone(scratch: Path, opcodes: list[int]) -> None:
    archive(scratch, bytes(opcodes) + b".")
    check_read(scratch)


SIZE = st.integers(0, 7) | st.integers(-2, 2**64 - 1)
SIZES = st.lists(SIZE, max_size=3).map(tuple)
NAMES = st.sampled_from([FLOAT, UNTYPED, ODICT, REBUILD, Name("torch", "HalfStorage"), Name("torch", "float16")])
STORAGES = st.builds(storage, NAMES, st.sampled_from(["0", "1"]), SIZE | st.sampled_from([6, 12, 24]))
VALUES = st.recursive(
    st.none() | SIZE | st.text(max_size=2) | NAMES | STORAGES | st.builds(rebuilt, STORAGES, SIZE, SIZES, SIZES),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
        | st.builds(Reduce, inner, inner)
        | st.builds(External, inner)
    ),
    max_leaves=10,
)


@given(value=VALUES | st.dictionaries(st.sampled_from("ab"), st.builds(rebuilt, STORAGES, SIZE, SIZES, SIZES)))
def test_pickles_of_any_structure_give_what_torch_gives(scratch: Path, value: Any) -> None:
    archive(scratch, pickled(value))
    assert_as_torch(scratch, check_read(scratch))


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    order=st.randoms(use_true_random=False),
)
def test_what_torch_saves_is_read_back(scratch: Path, shape: list[int], dtype: torch.dtype, order: Any) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    axes = list(range(len(shape)))
    order.shuffle(axes)
    state = {"a": tensor.permute(axes), "b": tensor.permute(axes)[1:] if shape and shape[axes[0]] else tensor}
    assert_equal(load(save(scratch, state)), state)


def test_the_unmutated_file_is_taken(scratch: Path) -> None:
    scratch.write_bytes(VALID)
    assert_equal(check_read(scratch), torch.load(scratch, weights_only=True))
    archive(scratch, PICKLE, {f"data/{key}": raw for key, raw in BYTES.items()})
    assert_equal(check_read(scratch), torch.load(scratch, weights_only=True))
