"""What is done to memory before a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.memory import LEFT, touch_free_memory


def resident(field: str) -> int:
    """Bytes of this process: now (VmRSS), or at most since the peak was forgotten (VmHWM)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) << 10


@pytest.mark.parametrize("megabytes", [-1, 0, 64])
def test_free_memory_is_touched_and_given_back(tmp_path: Path, megabytes: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 99 kB\nMemFree: {(LEFT >> 10) + megabytes * 1024} kB\n")
    Path("/proc/self/clear_refs").write_text("5")
    before, size = resident("VmRSS"), max(megabytes, 0) << 20
    assert touch_free_memory(meminfo) == size
    slack = 8 << 20
    assert abs(resident("VmHWM") - before - size) < slack
    assert abs(resident("VmRSS") - before) < slack


def test_a_system_that_does_not_tell_is_left_alone(tmp_path: Path) -> None:
    assert touch_free_memory(tmp_path / "none") == 0
