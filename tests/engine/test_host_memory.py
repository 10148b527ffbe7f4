"""Freed memory of tensors serves the next ones, and that of a cache may be taken before it is written."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.attention import StepAttention
from npu_zoo.engine import host_memory
from npu_zoo.engine.host_memory import take_memory
from npu_zoo.nn.attention.cache import allocate_zeros

HAS_STATM = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")

PROGRAM = """
import resource, torch
from npu_zoo.engine.host_memory import keep_freed_memory, return_freed_memory
if not keep_freed_memory():
    print(-1)
    raise SystemExit
if not {keep}:
    return_freed_memory()
def touch():
    torch.ones(64 << 20, dtype=torch.uint8)
for _ in range(20):
    touch()  # until memory of the size is there, between what else is allocated
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    """Pages that ten tensors of 64 MiB touch for the first time."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_not_touched_for_the_first_time_again() -> None:
    found = faults(True)
    if found < 0:
        pytest.skip("this C library is not glibc")
    assert found < 100
    assert faults(False) > 100 * (found + 1)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@HAS_STATM
def test_memory_is_taken_and_keeps_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_TAKEN_AT_ONCE", 24 << 20)
    keys = allocate_zeros((3, 16 << 20), torch.uint8, torch.device("cpu"))
    values = allocate_zeros((3, 2 << 20), torch.float32, torch.device("cpu"))
    keys[1, 5], values[2, 7] = 255, float("nan")
    seen: list[tuple[int, int]] = []
    before = resident()
    take_memory((keys, values), lambda done, total: seen.append((done, total)))
    assert resident() - before > (70 << 20)
    assert seen == [(size << 20, 72 << 20) for size in (24, 48, 72)]
    assert keys.sum() == 255
    assert values.isnan().sum() == 1


def test_nothing_is_taken_of_nothing() -> None:
    take_memory((), lambda *_: pytest.fail("there is nothing to tell"))


@HAS_STATM
@pytest.mark.parametrize(
    "options",
    [
        {"model": "deepseek_coder"},
        {"model": "deepseek_coder", "attention": "flash"},
        {"model": "deepseek_coder", "kv_cache_dtype": "int8"},
        {"model": "deepseek_v3"},
    ],
    ids=str,
)
def test_an_engine_takes_its_cache_s_memory_where_it_is_asked_to(options: dict[str, str]) -> None:
    written = []
    for prefault in (False, True):
        before = resident()
        sizes: dict[str, Any] = {"kv_cache_memory": "96MiB", "max_num_seqs": 256, "prefault_kv_cache": prefault}
        with LLM(allow_experimental=True, **sizes, **options) as llm:
            attention: StepAttention = llm.engine.runner.attention  # type: ignore[attr-defined]
            cache = sum(tensor.nbytes for tensor in attention.lazy_memory())
            grown = resident() - before
            outputs = llm.generate(["def add(a, b):"], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
            written.append(outputs[0].outputs[0].token_ids)
        assert cache > (60 << 20)
        assert (grown > cache) is prefault
    assert written[0] == written[1]
