from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.header import SAFETENSORS_DTYPES, parse_safetensors_header
from npu_zoo.weights.safetensors import INDEX_FILE, SafetensorsLoader

FILE = "model.safetensors"


def load(directory: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in SafetensorsLoader(directory).tensors()}


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def shards(directory: Path, contents: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    for shard, tensors in contents.items():
        save_file(tensors, directory / shard)
    weight_map = weight_map or {name: shard for shard, tensors in contents.items() for name in tensors}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), "utf-8")
    return directory


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


# What is read


@pytest.mark.parametrize(("dtype", "itemsize"), SAFETENSORS_DTYPES.values())
def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path, dtype: str, itemsize: int) -> None:
    raw = torch.arange(24 * itemsize, dtype=torch.uint8)
    kind = getattr(torch, dtype)
    tensor = (raw > 90) if kind is torch.bool else raw.view(kind)
    save_file({"a": tensor.reshape(2, 3, 4), "empty": tensor[:0], "scalar": tensor[0].clone()}, tmp_path / FILE)
    assert_equal(load(tmp_path), load_file(tmp_path / FILE))
    loader = SafetensorsLoader(tmp_path)
    assert loader.shapes() == {"a": (2, 3, 4), "empty": (0,), "scalar": ()}
    assert loader.total_bytes() == 25 * itemsize


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    data = bytes([7]) + torch.arange(3, dtype=torch.float32).numpy().tobytes()
    write(tmp_path / FILE, {"byte": entry([1], 0, 1, "U8"), "floats": entry([3], 1, 13)}, data)
    assert load(tmp_path)["floats"].tolist() == [0.0, 1.0, 2.0]
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for _, tensor in SafetensorsLoader(tmp_path).tensors())


def test_tensors_come_in_file_order_and_are_views(tmp_path: Path) -> None:
    data = torch.arange(4, dtype=torch.float32).numpy().tobytes()
    header = json.dumps({"z": entry([1], 0, 4), "b": entry([2], 4, 12), "a": entry([1], 12, 16)}).encode()
    write(tmp_path / FILE, header + b" " * (-len(header) % 8), data)
    seen = {name: tensor.data_ptr() for name, tensor in SafetensorsLoader(tmp_path).tensors()}
    assert list(seen) == ["z", "b", "a"]
    assert seen["b"] - seen["z"] == 4
    assert seen["a"] - seen["b"] == 8


def test_shards_are_read_through_the_index_alone(tmp_path: Path) -> None:
    contents = {"m-1.safetensors": {"a": torch.ones(2)}, "m-2.safetensors": {"b": torch.zeros(3)}}
    shards(tmp_path, contents)
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert_equal(load(tmp_path), {"a": torch.ones(2), "b": torch.zeros(3)})


def test_shards_without_an_index_are_read_if_they_are_complete(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"t{number}": torch.ones(number)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    assert SafetensorsLoader(tmp_path).shapes() == {"t1": (1,), "t2": (2,)}
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"shard model-00001-of-00002\.safetensors is missing"):
        SafetensorsLoader(tmp_path).shapes()


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    shards(tmp_path, {"m-1.safetensors": {"a": torch.ones(2)}})
    save_file({"merged": torch.ones(1)}, tmp_path / FILE)
    assert list(SafetensorsLoader(tmp_path).shapes()) == ["merged"]


# What is refused


@pytest.mark.parametrize(
    ("header", "data", "fault"),
    [
        (b"", b"", "does not begin with an opening brace"),
        (b"[]", b"", "does not begin with an opening brace"),
        (b"{", b"", "the header is not JSON"),
        (b'{"\xff":1}', b"", "the header is not UTF-8"),
        (b'{"a":' + b"[" * 100_000, b"", "the header is not JSON"),
        (b'{"a":NaN}', b"", "the header is not JSON"),
        (b'{"a":1,"a":2}', b"", "names 'a' twice"),
        (b'{"a\\ud800":{}}', b"", r"tensor name 'a\\ud800'"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"a": 1}, b"", "tensor a: its entry is no JSON object"),
        ({"a": entry([1], 0, 4, "F31")}, bytes(4), "tensor a: dtype 'F31' is not known; known: F64"),
        ({"a": entry([-1], 0, 4)}, bytes(4), r"tensor a: shape \[-1\]"),
        ({"a": entry([True], 0, 4)}, bytes(4), r"tensor a: shape \[True\]"),
        ({"a": entry([1.0], 0, 4)}, bytes(4), r"tensor a: shape \[1.0\]"),  # type: ignore[list-item]
        ({"a": entry([0, 2**62, 2**62], 0, 0)}, b"", "tensor a: shape"),
        ({"a": entry([10**400], 0, 4)}, bytes(4), "tensor a: shape"),
        ({"a": entry([1], 0, 4) | {"data_offsets": [0]}}, bytes(4), r"tensor a: data_offsets \[0\]"),
        ({"a": entry([1], 4, 0)}, bytes(4), "tensor a: bytes 4 to 0"),
        (
            {"a": entry([2], 0, 8)},
            bytes(4),
            "tensor a: bytes 0 to 8 lie outside the 4 bytes of data; is the",
        ),
        ({"a": entry([2], 0, 4)}, bytes(4), r"tensor a: F32 of shape \[2\] does not take the 4 bytes"),
        ({"a": entry([1], 4, 8)}, bytes(8), "tensor a leaves a hole before it"),
        ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, bytes(6), "tensor b overlaps the tensor before it"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4), "tensor b overlaps the tensor before it"),
        ({"a": entry([1], 0, 4)}, bytes(7), "3 bytes after the last tensor belong to none"),
    ],
)
def test_headers_that_break_the_format(tmp_path: Path, header: Any, data: bytes, fault: str) -> None:
    write(tmp_path / FILE, header, data)
    with pytest.raises(WeightsError, match=fault) as caught:
        SafetensorsLoader(tmp_path).shapes()
    assert str(tmp_path / FILE) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"\xff" * 8, (2**40).to_bytes(8, "little"), b"\x05" + bytes(7)])
def test_files_that_are_too_short_for_their_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(WeightsError, match="no safetensors file, or a truncated one"):
        SafetensorsLoader(tmp_path).shapes()


@pytest.mark.parametrize(
    ("weight_map", "fault"),
    [
        ({"a": "m.safetensors", "lost": "m.safetensors"}, "lost is not in m.safetensors"),
        ({"b": "m.safetensors"}, "b is not in m.safetensors; a is in m.safetensors and not in the index"),
        ({"a": "m.safetensors", "c": "gone.safetensors"}, "shard 'gone.safetensors' is missing"),
        ({"a": "../outside.safetensors"}, "link out of the directory"),
        ({"a": 1}, "weight_map does not map"),
        ({"a": "m\0.safetensors"}, "is missing"),
    ],
)
def test_an_index_that_contradicts_its_shards(tmp_path: Path, weight_map: dict[str, str], fault: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    shards(tmp_path / "checkpoint", {"m.safetensors": {"a": torch.ones(1)}}, weight_map)
    with pytest.raises(WeightsError, match=fault):
        SafetensorsLoader(tmp_path / "checkpoint").shapes()


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX_FILE).write_text(index, "utf-8")
    with pytest.raises(WeightsError, match=INDEX_FILE.replace(".", r"\.")):
        SafetensorsLoader(tmp_path).shapes()


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"same": torch.ones(1)}, tmp_path / name)
    with pytest.raises(WeightsError, match=r"tensor same is in .*a\.safetensors and again in .*b\.safetensors"):
        SafetensorsLoader(tmp_path).shapes()


def test_links_out_of_the_directory_are_refused_except_the_hubs_own(tmp_path: Path) -> None:
    outside, checkpoint = tmp_path / "outside.safetensors", tmp_path / "checkpoint"
    save_file({"a": torch.ones(1)}, outside)
    checkpoint.mkdir()
    (checkpoint / FILE).symlink_to(outside)
    with pytest.raises(WeightsError, match=f"link out of the directory, to {outside}"):
        SafetensorsLoader(checkpoint).shapes()
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    shutil.copy(outside, snapshot.parent.parent / "blobs" / "hash")
    (snapshot / FILE).symlink_to("../../blobs/hash")
    assert SafetensorsLoader(snapshot).shapes() == {"a": (1,)}


def test_a_file_that_changes_before_it_is_mapped_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / FILE)
    loader = SafetensorsLoader(tmp_path)
    loader.shapes()
    save_file({"a": torch.ones(2)}, tmp_path / FILE)
    with pytest.raises(WeightsError, match="the file changed"):
        list(loader.tensors())


def test_an_empty_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no \*\.safetensors file"):
        SafetensorsLoader(tmp_path).shapes()


# Properties

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
SIZE = st.integers(-1, 9) | st.integers()
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*SAFETENSORS_DTYPES, "F31"]) | JSON,
        "shape": st.lists(SIZE, max_size=3) | JSON,
        "data_offsets": st.lists(SIZE, min_size=2, max_size=2) | JSON,
    }
)


def accepts(raw: bytes, data: bytes) -> bool:
    try:
        parse_safetensors_header(raw, len(data), Path("x.safetensors"))
    except WeightsError:
        return False
    return True


def library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


@given(header=st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3) | JSON, length=st.integers(0, 40))
def test_no_header_raises_anything_but_weights_errors(
    tmp_path_factory: pytest.TempPathFactory, header: Any, length: int
) -> None:
    raw, data = json.dumps(header).encode(), bytes(length)
    if accepts(raw, data):
        assert library_accepts(write(tmp_path_factory.mktemp("header") / FILE, raw, data))


VALID = (
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"U8","shape":[2,1],"data_offsets":[8,10]}}  '
)


@given(edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=2)), max_size=3), data=st.data())
def test_mutated_headers_are_never_taken_where_the_library_refuses(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    raw = bytearray(VALID)
    for position, replacement in edits:
        raw[position : position + data.draw(st.integers(0, 2))] = replacement
    content = bytes(data.draw(st.sampled_from([10, 10, 10, 9, 11])))
    if accepts(bytes(raw), content):
        assert library_accepts(write(tmp_path_factory.mktemp("header") / FILE, bytes(raw), content))


def test_the_unmutated_header_is_taken() -> None:
    assert accepts(VALID, bytes(10))


@given(content=st.binary(max_size=64))
def test_random_files_raise_weights_errors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.mktemp("random")
    (directory / FILE).write_bytes(content)
    with pytest.raises(WeightsError):
        SafetensorsLoader(directory).shapes()


PEAK = """
import re, sys, pathlib, torch
from npu_zoo.weights.load import load_weights
from npu_zoo.weights.safetensors import SafetensorsLoader

def peak():  # of this process alone: ru_maxrss counts the parent's, up to the exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

loader = SafetensorsLoader(pathlib.Path(sys.argv[1]))
torch.ones(8).to(torch.float32).copy_(torch.ones(8))
before = peak()
own = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in loader.shapes().items()}
load_weights(dict(own), loader)
print((peak() - before) / loader.total_bytes(), float(own["layer.29"][-1, -1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_loading_does_not_hold_two_copies(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((1000, 5000), float(i), dtype=torch.bfloat16) for i in range(30)}
    save_file(tensors, tmp_path / FILE)
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    growth, last = map(float, done.stdout.split())
    assert last == 29.0
    assert 1.0 <= growth < 1.35
