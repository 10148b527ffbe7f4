"""Which hardware this machine has, found without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from npu_zoo.platforms.ascend import detect_ascend, run_npu_smi


def detect_products(dev: Path = Path("/dev"), npu_smi: Callable[[], str] = run_npu_smi) -> tuple[str, ...]:
    """The products that this machine can be, where the user named none: ``cpu`` unless an Ascend device is present.

    Raises:
        HardwareError: there are Ascend devices that the zoo does not know, or of several chips.
    """
    return detect_ascend(dev, npu_smi) or ("cpu",)


def is_simulated(device: str) -> bool:
    """Whether a device of this type is simulated in this process, so that times on it say nothing."""
    return device == "npu" and bool(os.environ.get("NPU_ZOO_SIMULATE"))


def available_memory() -> int:
    """Bytes of memory that a new process could take, within the control group's limit where there is one."""
    free = _meminfo_available()
    for limit_file, usage_file in _CGROUP_FILES:
        try:
            limit, usage = limit_file.read_text().strip(), int(usage_file.read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            free = min(free, int(limit) - usage)
    return max(free, 0)


def total_memory() -> int:
    """Bytes of memory that this machine has, within the control group's limit where there is one."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit_file, _ in _CGROUP_FILES:
        try:
            limit = limit_file.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


_CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def _meminfo_available() -> int:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(match.group(1)) * 1024 if match else 0
