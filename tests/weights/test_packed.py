"""Files of packed weights: what is kept comes back, and nothing else does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights import packed
from npu_zoo.weights.packed import (
    PackedSource,
    files_state,
    list_packed,
    packed_folder,
    read_packed,
    remove_packed,
    write_packed,
)

SOURCE = PackedSource("/models/a", "{}", "one")


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


def equal(found: dict[str, torch.Tensor] | None, due: dict[str, torch.Tensor]) -> bool:
    return found is not None and found.keys() == due.keys() and all(torch.equal(found[name], due[name]) for name in due)


def test_what_was_kept_comes_back_at_cache_lines() -> None:
    assert read_packed(SOURCE) is None
    seen: list[tuple[int, int]] = []
    path = write_packed(SOURCE, tensors(), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4096 + 192 + 384, 4096 + 192 + 384)
    found = read_packed(SOURCE)
    assert equal(found, tensors())
    assert found is not None
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
    assert equal(load_file(path), tensors())  # it is a file that others read too


def test_a_change_of_what_it_was_made_of_puts_it_out_of_date() -> None:
    path = write_packed(SOURCE, tensors())
    changed = PackedSource(SOURCE.weights, SOURCE.request, "two")
    assert changed.path == path
    assert read_packed(changed) is None
    write_packed(changed, tensors(1))
    assert equal(read_packed(changed), tensors(1))
    assert read_packed(SOURCE) is None
    assert [file.source for file in list_packed()] == [changed]


def test_other_requests_have_files_of_their_own() -> None:
    others = [PackedSource("/models/b", "{}", "one"), PackedSource("/models/a", '{"tp": 2}', "one")]
    paths = {write_packed(source, tensors(number)) for number, source in enumerate([SOURCE, *others])}
    assert len(paths) == 3
    assert all(equal(read_packed(source), tensors(number)) for number, source in enumerate([SOURCE, *others]))


def test_a_file_that_is_replaced_stays_with_those_who_mapped_it() -> None:
    write_packed(SOURCE, tensors())
    mapped = read_packed(SOURCE)
    write_packed(SOURCE, tensors(1))
    assert equal(mapped, tensors())
    assert equal(read_packed(SOURCE), tensors(1))


@pytest.mark.parametrize("kept", [0, 7, 100, 4096, 5000])
def test_a_damaged_file_is_not_taken(kept: int) -> None:
    path = write_packed(SOURCE, tensors())
    path.write_bytes(path.read_bytes()[:kept])
    assert read_packed(SOURCE) is None


def test_a_write_that_fails_leaves_what_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed(SOURCE, tensors())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match=r"No space left on device; --packed-weights auto runs without"):
        write_packed(SOURCE, tensors(1))
    assert equal(read_packed(SOURCE), tensors())
    assert len(list(packed_folder().iterdir())) == 1


def test_a_disk_without_room_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_ROOM_LEFT", 1 << 60)
    with pytest.raises(WeightsError, match=r"GB free; free some \(`npu-zoo weights packed` lists"):
        write_packed(SOURCE, tensors())
    assert list_packed() == []


def test_what_a_killed_run_left_is_removed_in_time() -> None:
    path = write_packed(SOURCE, tensors())
    old, new = (path.with_name(f"{path.name}.new-{name}") for name in ("old", "new"))
    for scratch in (old, new):
        scratch.write_bytes(b"half of it")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    write_packed(SOURCE, tensors())
    assert not old.exists()
    assert new.exists()  # somebody may be writing it
    assert len(list_packed()) == 1


def test_tensors_that_fill_no_whole_lines_are_refused() -> None:
    with pytest.raises(WeightsError, match="b has 63 bytes"):
        write_packed(SOURCE, {"b": torch.zeros(63, dtype=torch.uint8)})
    assert list_packed() == []


def test_removing_one_leaves_the_others() -> None:
    other = PackedSource("/models/b", "{}", "one")
    write_packed(SOURCE, tensors())
    write_packed(other, tensors(1))
    remove_packed(next(file for file in list_packed() if file.source == SOURCE))
    assert [file.source for file in list_packed()] == [other]


def test_a_checkpoint_whose_files_change_is_another_one(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    (folder / "rank_0").mkdir(parents=True)
    file = folder / "rank_0" / "model.safetensors"
    file.write_bytes(b"1234")
    before = files_state(folder)
    assert [name for name, *_ in before] == ["rank_0/model.safetensors"]
    os.utime(file, ns=(0, 0))
    assert files_state(folder) != before
