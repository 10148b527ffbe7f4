"""Memory under weights: what is moved to huge pages keeps its address and what it holds, whoever reads it meanwhile."""

from __future__ import annotations

import mmap
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from npu_zoo.compiled.library import obstacle
from npu_zoo.nn.kernels.compiled.memory import move_to_huge_pages
from npu_zoo.weights.mapping import map_file

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}")

HUGE = 2 << 20


def mapped_file(path: Path, num_bytes: int) -> tuple[Tensor, bytes]:
    """A file on small pages, which small writes give it, mapped; and what it holds."""
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    content = data.numpy().tobytes()
    with path.open("wb", buffering=0) as file:
        for first in range(0, num_bytes, mmap.PAGESIZE):
            file.write(content[first : first + mmap.PAGESIZE])
    return torch.frombuffer(map_file(path), dtype=torch.uint8), content


def resident_of_file(path: Path) -> int:
    """Bytes of this process that come from a file."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    kilobytes = [re.search(r"^Rss:\s+(\d+) kB", entry, re.M) for entry in entries if str(path) in entry.split("\n")[0]]
    return sum(int(found[1]) << 10 for found in kilobytes if found)


def move_all(memory: Tensor) -> list[int]:
    """Where each part ended."""
    ends = [move_to_huge_pages(memory)]
    while ends[-1] < len(memory):
        ends.append(move_to_huge_pages(memory, ends[-1]))
    return ends


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("num_bytes", [100, HUGE - 1, 3 * HUGE + 5000, (64 << 20) + 5 * HUGE])
def test_moved_memory_is_as_it_was(num_bytes: int, tmp_path: Path) -> None:
    memory, content = mapped_file(tmp_path / "file", num_bytes)
    address = memory.data_ptr()
    assert memory.numpy().tobytes() == content
    ends = move_all(memory)
    assert (memory.data_ptr(), memory.numpy().tobytes()) == (address, content)
    assert ends == sorted(set(ends))
    # What lies before the first whole page and after the last one stays.
    assert resident_of_file(tmp_path / "file") <= min(num_bytes, 2 * HUGE) + mmap.PAGESIZE
    move_all(memory)  # what has been moved stays, or is moved again where the system has no huge pages
    assert (memory.data_ptr(), memory.numpy().tobytes()) == (address, content)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_who_reads_meanwhile_sees_the_same(tmp_path: Path) -> None:
    memory, content = mapped_file(tmp_path / "file", 40 * HUGE)
    due, seen, done = int(memory.sum(dtype=torch.int64)), set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(int(memory.sum(dtype=torch.int64)))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    assert len(move_all(memory)) > 1
    done.set()
    for reader in readers:
        reader.join()
    assert seen == {due}
    assert memory.numpy().tobytes() == content
