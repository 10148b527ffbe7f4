"""The machine's free memory, brought to one state before anything is measured."""

from __future__ import annotations

import mmap
from pathlib import Path

LEFT = 2 << 30
"""Bytes that stay free, so that nothing else has to give way."""


def touch_free_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Write to free memory once and give it back; how many bytes that were.

    A virtual machine's host gives it memory when that is first used, which takes ten times as long as later uses. What
    had touched which memory before would else decide how long each engine's start takes.
    """
    size = _free(meminfo) - LEFT
    if size <= 0 or not hasattr(mmap, "MAP_POPULATE"):
        return 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    with mmap.mmap(-1, size, flags=flags):
        return size


def _free(meminfo: Path) -> int:
    if not meminfo.exists():
        return 0
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemFree"].split()[0]) << 10
