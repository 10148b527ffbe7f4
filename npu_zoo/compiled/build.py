"""Builds the compiled library: by command, or in the background of a first run, which never waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from npu_zoo.compiled.library import COMMAND, FAILURE, NAME, can_be_built, find_compiler, library_folder, sources
from npu_zoo.core.errors import HardwareError

OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-w")
_THREADS = "-fopenmp"
"""Given to the compiler and not to the linker: the threads are torch's, whose library is loaded before this one."""

_BACKGROUND_NICENESS = 19


def build(*, force: bool = False) -> Path:
    """Compile the library where it is missing, and give its path.

    Args:
        force: compile it even where it exists, or where an earlier build failed.

    Raises:
        HardwareError: there is no compiler, or it fails; with what it printed.
    """
    folder = library_folder()
    target = folder / NAME
    if target.is_file() and not force:
        return target
    compiler = find_compiler()
    if compiler is None:
        raise HardwareError(
            f"`{COMMAND}` needs a C++ compiler, and neither CXX names one nor is g++ there; on Debian: apt install g++"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as scratch:
        made = Path(scratch) / NAME
        failure = _compile(compiler, Path(scratch), made)
        if failure:
            (Path(scratch) / FAILURE).write_text(failure)
            (Path(scratch) / FAILURE).replace(folder / FAILURE)
            raise HardwareError(f"the compiled kernels cannot be built; kernels in plain torch serve\n{failure}")
        made.replace(target)
    (folder / FAILURE).unlink(missing_ok=True)
    return target


def build_in_background() -> bool:
    """Start a build that outlives this process and gives way to it; False where there is nothing to build.

    Two that run at once each put a whole library in its place.
    """
    if not can_be_built():
        return False
    process = subprocess.Popen(
        [sys.executable, "-m", "npu_zoo.compiled.build"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # Or Python warns of it when it collects the object, and the process stays a zombie.
    threading.Thread(target=process.wait, name="kernels-build", daemon=True).start()
    return True


def _compile(compiler: str, scratch: Path, target: Path) -> str:
    """Compile and link; what went wrong, empty where nothing did."""
    objects = []
    for source in sources():
        objects.append(str(scratch / f"{source.stem}.o"))
        failure = _run([compiler, *OPTIONS, _THREADS, "-c", str(source), "-o", objects[-1]])
        if failure:
            return failure
    return _run([compiler, "-shared", "-o", str(target), *objects])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{' '.join(command)}\n{done.stderr.strip()}" if done.returncode else ""


if __name__ == "__main__":
    os.nice(_BACKGROUND_NICENESS)
    build()
