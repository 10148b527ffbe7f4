"""Where the compiled library lies, and why it cannot serve where it cannot.

A build is for one processor's instructions and one state of the sources, and lies in a folder named by both.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
from pathlib import Path

from npu_zoo.platforms.caches import cache_folder

SOURCES = Path(__file__).parent / "csrc"
NAME = "libnpu_zoo_cpu.so"
COMMAND = "npu-zoo kernels build"
CONDITION = f"{__name__}:obstacle"
"""What specs of compiled kernels have as their ``condition``."""
_ABOUT_THE_PROCESSOR = ("flags", "Features", "model name", "CPU part")
_WIDE_VECTORS = ("avx512f", "avx512bw", "avx512vl")
_PROCESSOR_INFO = Path("/proc/cpuinfo")


FAILURE = "failure.txt"
"""Beside the library's place, what the compiler said when it failed."""


def obstacle() -> str:
    """Why the compiled kernels cannot serve here; empty where they can."""
    if platform.system() != "Linux":
        return f"it is built on Linux alone, and this is {platform.system()}"
    if not _has_wide_vectors():
        return "it pays on processors with AVX-512 alone, and this one has none"
    folder = library_folder()
    if (folder / NAME).is_file():
        return ""
    if (folder / FAILURE).is_file():
        return f"its build failed, as {folder / FAILURE} tells; `{COMMAND}` tries again"
    if find_compiler() is None:
        return f"it is not built, and there is no C++ compiler (CXX, g++); with one, `{COMMAND}` builds it"
    return f"it is not built yet; `{COMMAND}` does it within seconds"


def can_be_built() -> bool:
    """Whether all that is missing is a build that was not tried yet."""
    folder = library_folder()
    missing = not (folder / NAME).is_file() and not (folder / FAILURE).is_file()
    return missing and platform.system() == "Linux" and _has_wide_vectors() and find_compiler() is not None


def library_path() -> Path:
    """The library of this processor and these sources, whether it exists or not."""
    return library_folder() / NAME


def library_folder() -> Path:
    """The folder of the library, beneath ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return cache_folder() / "kernels" / _digest()


def sources() -> list[Path]:
    """What is compiled, in a fixed order."""
    return sorted(SOURCES.glob("*.cpp"))


def find_compiler() -> str | None:
    """The C++ compiler: ``CXX`` or g++, whose threads are the ones that torch uses."""
    for name in (os.environ.get("CXX", ""), "g++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


@functools.cache
def _digest() -> str:
    parts = [path.name.encode() + b"\0" + path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    parts += [Path(__file__).with_name("build.py").read_bytes(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _has_wide_vectors() -> bool:
    """Whether the processor has vectors of 64 bytes; without, compilers make slow code of the products of many rows."""
    told = _processor().split()
    return all(flag in told for flag in _WIDE_VECTORS)


@functools.cache
def _processor() -> str:
    """What tells processors with different instructions apart, of the first core."""
    try:
        with _PROCESSOR_INFO.open(encoding="utf-8", errors="replace") as file:
            lines = [line for line, _ in zip(file, range(64), strict=False)]
    except OSError:
        return platform.machine()
    first = "".join(lines).split("\n\n", 1)[0].splitlines()
    told = [line for line in first if line.partition("\t")[0].partition(":")[0].strip() in _ABOUT_THE_PROCESSOR]
    return "\n".join([platform.machine(), *told])
