"""What the machine is, with the fields of the records here, and what it can do in bfloat16."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("npu-zoo", "torch", "transformers", "tokenizers", "safetensors")


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
    import torch

    from npu_zoo.evaluation.machine import READ_BYTES, matrix_peak, read_bandwidth

    cpu = torch.device("cpu")
    return {
        "bandwidth": read_bandwidth(READ_BYTES // divisor, cpu),
        "matrix_peak": matrix_peak(torch.bfloat16, cpu, divisor),
    }


def _cpuinfo(key: str) -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
