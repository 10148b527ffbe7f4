"""Files of packed weights: what is kept comes back, and nothing else does."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load_file

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights import packed
from npu_zoo.weights.packed import (
    MappedTensors,
    PackedRequest,
    file_states,
    list_packed,
    packed_folder,
    read_packed,
    remove_abandoned,
    remove_packed,
    write_packed,
)

REQUEST, STATE = PackedRequest("/models/a", "{}"), "one"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.panels": torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=generator),
        "b.panels": torch.randint(0, 256, (192,), dtype=torch.uint8, generator=generator),
        "b.scales": torch.randn(2, 3, 16, generator=generator),
    }


def equal(mapped: MappedTensors | None, due: dict[str, torch.Tensor]) -> bool:
    return mapped is not None and same(mapped.tensors, due)


def same(found: dict[str, torch.Tensor], due: dict[str, torch.Tensor]) -> bool:
    return found.keys() == due.keys() and all(torch.equal(found[name], due[name]) for name in due)


def test_what_was_kept_comes_back_at_cache_lines() -> None:
    assert read_packed(REQUEST, STATE) is None
    seen: list[tuple[int, int]] = []
    path = write_packed(REQUEST, STATE, tensors(), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4096 + 192 + 384, 4096 + 192 + 384)
    found = read_packed(REQUEST, STATE)
    assert equal(found, tensors())
    assert found is not None
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.tensors.values())
    assert found.memory.numpy().tobytes() == path.read_bytes()
    assert same(load_file(path), tensors())  # it is a file that others read too


def test_another_state_puts_it_out_of_date() -> None:
    path = write_packed(REQUEST, STATE, tensors())
    assert read_packed(REQUEST, "two") is None
    assert write_packed(REQUEST, "two", tensors(1)) == path
    assert equal(read_packed(REQUEST, "two"), tensors(1))
    assert read_packed(REQUEST, STATE) is None
    assert [file.request for file in list_packed()] == [REQUEST]


def test_other_requests_have_files_of_their_own() -> None:
    requests = [REQUEST, PackedRequest("/models/b", "{}"), PackedRequest("/models/a", '{"tp": 2}')]
    paths = {write_packed(request, STATE, tensors(number)) for number, request in enumerate(requests)}
    assert len(paths) == 3
    assert all(equal(read_packed(request, STATE), tensors(number)) for number, request in enumerate(requests))


def test_a_file_in_another_place_is_not_taken() -> None:
    path = write_packed(REQUEST, STATE, tensors())
    other = PackedRequest("/models/b", "{}")
    path.rename(other.path)
    assert read_packed(other, STATE) is None


def test_what_is_compared_is_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody replaces the file between both."""
    write_packed(REQUEST, STATE, tensors())
    plain = packed.map_file

    def replaced(path: Path) -> Any:
        found = plain(path)
        monkeypatch.setattr(packed, "map_file", plain)
        write_packed(REQUEST, "two", tensors(1))
        return found

    monkeypatch.setattr(packed, "map_file", replaced)
    assert equal(read_packed(REQUEST, STATE), tensors())


def test_a_file_that_is_replaced_stays_with_those_who_mapped_it() -> None:
    write_packed(REQUEST, STATE, tensors())
    mapped = read_packed(REQUEST, STATE)
    write_packed(REQUEST, STATE, tensors(1))
    assert equal(mapped, tensors())
    assert equal(read_packed(REQUEST, STATE), tensors(1))


@pytest.mark.parametrize("kept", [0, 7, 100, 4096, 5000])
def test_a_file_that_was_cut_short_is_not_taken(kept: int) -> None:
    path = write_packed(REQUEST, STATE, tensors())
    path.write_bytes(path.read_bytes()[:kept])
    assert read_packed(REQUEST, STATE) is None
    assert [file.path for file in list_packed()] == [path]


@pytest.mark.parametrize("taken_at_once", [700, 1 << 20])
def test_a_file_is_written_in_blocks(monkeypatch: pytest.MonkeyPatch, taken_at_once: int) -> None:
    block, plain, ends = 1024, packed._replacing, []

    class Shortly:
        """A file that takes part of what it is given."""

        def __init__(self, file: IO[bytes]) -> None:
            self.file = file

        def write(self, data: memoryview) -> int:
            ends.append(self.file.tell() + len(data))
            return self.file.write(data[:taken_at_once])

    @contextmanager
    def replacing(path: Path) -> Iterator[Any]:
        with plain(path) as file:
            yield Shortly(file)

    monkeypatch.setattr(packed, "_BLOCK", block)
    monkeypatch.setattr(packed, "_replacing", replacing)
    path = write_packed(REQUEST, STATE, tensors())
    assert equal(read_packed(REQUEST, STATE), tensors())
    size = path.stat().st_size
    assert len(set(ends)) == -(-size // block) > 4
    assert all(end % block == 0 or end == size for end in ends)


def test_a_write_that_fails_leaves_what_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed(REQUEST, STATE, tensors())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match=r"No space left on device; --packed-weights auto runs without"):
        write_packed(REQUEST, STATE, tensors(1))
    assert equal(read_packed(REQUEST, STATE), tensors())
    assert len(list(packed_folder().iterdir())) == 1


def test_a_disk_without_room_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_ROOM_LEFT", 1 << 60)
    with pytest.raises(WeightsError, match=r"GB free; free some \(`npu-zoo weights packed` lists"):
        write_packed(REQUEST, STATE, tensors())
    assert list_packed() == []


_WRITER = """
import sys, torch
from npu_zoo.weights import packed
def wait(*_):
    print("writing", flush=True)
    sys.stdin.read()
packed.write_packed(packed.PackedRequest("/models/b", "{}"), "one", {"a": torch.zeros(64)}, wait)
"""


def test_what_a_killed_run_left_is_removed_and_what_another_writes_is_not() -> None:
    with subprocess.Popen([sys.executable, "-c", _WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        write_packed(REQUEST, STATE, tensors())
        assert len(list(packed_folder().iterdir())) == 2
        writer.kill()
    assert len(list(packed_folder().iterdir())) == 2
    remove_abandoned()
    assert list(packed_folder().iterdir()) == [REQUEST.path]


def test_a_file_that_is_taken_for_abandoned_before_it_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            remove_abandoned()
        plain(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_packed(REQUEST, STATE, tensors())
    assert len(calls) == 3
    assert equal(read_packed(REQUEST, STATE), tensors())
    assert list(packed_folder().iterdir()) == [REQUEST.path]


def test_tensors_that_fill_no_whole_lines_are_refused() -> None:
    with pytest.raises(WeightsError, match="b has 63 bytes"):
        write_packed(REQUEST, STATE, {"b": torch.zeros(63, dtype=torch.uint8)})
    assert list_packed() == []


def test_removing_one_leaves_the_others() -> None:
    other = PackedRequest("/models/b", "{}")
    write_packed(REQUEST, STATE, tensors())
    write_packed(other, STATE, tensors(1))
    remove_packed(next(file for file in list_packed() if file.request == REQUEST))
    assert [file.request for file in list_packed()] == [other]


def test_a_file_that_changes_has_another_state(tmp_path: Path) -> None:
    """Even one of the same size and with the same time of writing."""
    file = tmp_path / "rank_0" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"1234")
    before, stat = file_states([file], tmp_path), file.stat()
    assert before == file_states([tmp_path / "rank_0" / ".." / "rank_0" / file.name], tmp_path)
    assert [name for name, *_ in before] == ["rank_0/model.safetensors"]
    file.write_bytes(b"4321")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_states([file], tmp_path) != before
    file.unlink()
    assert file_states([file], tmp_path) == []
