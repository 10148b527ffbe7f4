"""What the machine is, and what it can do: read bandwidth and bfloat16 matrix peak."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PACKAGES = ("npu-zoo", "torch", "transformers", "tokenizers", "safetensors")
READ_BYTES = 2**30
MATRIX_SHAPES = ((2048, 2048, 5504), (2048, 5504, 2048), (4096, 4096, 4096))
REPETITIONS = 7


def describe(threads: int) -> dict[str, Any]:
    """The machine and the versions, read without torch."""
    flags = set(_cpuinfo("flags").split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": _cpuinfo("model name") or platform.processor(),
        "cpu_family_model": f"{_cpuinfo('cpu family')}/{_cpuinfo('model')}",
        "instructions": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def measure(divisor: int = 1) -> dict[str, float]:
    """Bytes read per second and bfloat16 operations per second: the best of several kernels and repetitions.

    Args:
        divisor: makes the work smaller, for a check of the script rather than of the machine.
    """
    return {"bandwidth": _read_bandwidth(READ_BYTES // divisor), "matrix_peak": _matrix_peak(divisor)}


def _read_bandwidth(size: int) -> float:
    import torch

    data = torch.zeros(size // 8, dtype=torch.int64)
    data_bytes = data.view(torch.uint8)
    data_bytes.fill_(1)
    readers: tuple[Callable[[], object], ...] = (data.max, data_bytes.all)
    return size / min(_best_seconds(reader) for reader in readers)


def _matrix_peak(divisor: int) -> float:
    import torch

    best = 0.0
    for shape in MATRIX_SHAPES:
        rows, inner, columns = (size // divisor for size in shape)
        left = torch.randn(rows, inner).bfloat16()
        weight = torch.randn(columns, inner).bfloat16()
        seconds = _best_seconds(partial(torch.nn.functional.linear, left, weight))
        best = max(best, 2 * rows * inner * columns / seconds)
    return best


def _best_seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _cpuinfo(key: str) -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
