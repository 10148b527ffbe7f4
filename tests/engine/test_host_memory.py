"""Freed memory of tensors serves the next ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
