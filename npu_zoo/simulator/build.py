"""Builds the stub libraries from the torch_npu that is installed, with the C compiler at hand, and keeps them.

Which libraries and symbols are needed is read from torch_npu's own files, so a release with others just works. All
symbols lie in one library, which the others are linked with: the state of the runtime exists once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from npu_zoo.simulator.elf import SharedLibrary, read_library
from npu_zoo.simulator.errors import SimulatorError, Unavailable

RUNTIME_LIBRARY = "libascendcl.so"
OPERATOR_LIBRARY = "libopapi.so"
SOURCE = Path(__file__).parent / "csrc" / "runtime.c"

_VENDOR_SYMBOL = re.compile(r"(acl|Hccl|Hcom|Msprof|rt[A-Z]|_ZNK?3atb|_ZNK?2ge)")
_VENDOR_LIBRARY = re.compile(r"lib(hccl|acl|ascend|ge_|graph|atb|opapi|runtime|nnopbase)")
_OPENED = ("libnnopbase.so",)
"""What is not linked but opened by name when an operator is called."""

_OPERATOR = rb"aclnn[A-Za-z0-9_]+"
_SIZE = "WorkspaceSize"
"""How names end that ask for the memory of an operator; those are no launches."""


@dataclass(frozen=True)
class Needs:
    """What the libraries of one torch_npu ask of CANN.

    Attributes:
        libraries: the names that they are linked with.
        symbols: the functions that must exist when they are loaded.
        operators: the kernels that they look up by name when an operator is called.
    """

    libraries: frozenset[str]
    symbols: frozenset[str]
    operators: frozenset[str]


def package_folder() -> Path:
    """Where torch_npu lies, found without importing it.

    Raises:
        Unavailable: it is not installed.
    """
    for entry in sys.path:
        folder = Path(entry or ".") / "torch_npu"
        if (folder / "__init__.py").is_file():
            return folder.resolve()
    raise Unavailable("torch_npu is not installed; install the release that fits torch, such as torch-npu==2.13.0")


def compiler() -> str:
    """The C compiler: ``CC``, cc, gcc or clang.

    Raises:
        Unavailable: there is none.
    """
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise Unavailable("no C compiler was found (CC, cc, gcc, clang); on Debian: apt install gcc libc6-dev")


def needs_of(folder: Path) -> Needs:
    """Read what the libraries of a torch_npu package need.

    Raises:
        SimulatorError: the folder holds no libraries of torch_npu.
    """
    libraries = [read_library(path) for path in _libraries(folder)]
    if not libraries:
        raise SimulatorError(f"{folder} holds no libraries of torch_npu")
    return Needs(
        frozenset(name for library in libraries for name in library.needed if _VENDOR_LIBRARY.match(name)),
        frozenset(name for library in libraries for name in library.undefined if _VENDOR_SYMBOL.match(name)),
        frozenset(name for library in libraries for name in _operators(library)),
    )


def stub_folder(package: Path) -> Path:
    """The folder with the stub libraries for a torch_npu package; built where the cache has none.

    Raises:
        Unavailable: there is no compiler.
        SimulatorError: the compiler fails; with what it printed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npu-zoo" / "simulator"
    target = cache / _digest(package)
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as scratch:
        made = Path(scratch) / "stub"
        build(needs_of(package), made)
        try:
            made.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    return target


def build(needs: Needs, target: Path) -> None:
    """Compile the stub libraries into a new folder.

    Raises:
        Unavailable, SimulatorError: as in :func:`stub_folder`.
    """
    target.mkdir(parents=True)
    source = SOURCE.read_text()
    missing = sorted(
        needs.symbols - set(re.findall(r"\b(\w+)\(", source)) - set(re.findall(r"ATTRIBUTE\((\w+)\)", source))
    )
    (target / "unsupported.c").write_text(
        "int sim_unsupported(const char *);\n"
        + "".join(f'int {name}(void) {{ return sim_unsupported("{name}"); }}\n' for name in missing)
    )
    (target / "operators.c").write_text("int sim_launch(const char *);\n" + "".join(_operator_stubs(needs.operators)))
    _compile(target, RUNTIME_LIBRARY, [str(SOURCE), "unsupported.c"], ["-O1", "-lpthread"])
    _compile(target, OPERATOR_LIBRARY, ["operators.c"], ["-O0", RUNTIME_LIBRARY])
    (target / "empty.c").write_text("")
    for name in sorted({*needs.libraries, *_OPENED} - {RUNTIME_LIBRARY, OPERATOR_LIBRARY}):
        _compile(target, name, ["empty.c"], ["-Wl,--no-as-needed", RUNTIME_LIBRARY])


def load_order(folder: Path) -> Iterable[Path]:
    """The stub libraries, those that others are linked with first."""
    rest = sorted(path for path in folder.glob("*.so") if path.name not in (RUNTIME_LIBRARY, OPERATOR_LIBRARY))
    return [folder / RUNTIME_LIBRARY, folder / OPERATOR_LIBRARY, *rest]


def _libraries(folder: Path) -> list[Path]:
    return sorted([*folder.glob("lib/*.so"), *folder.glob("_C*.so")])


def _operators(library: SharedLibrary) -> set[str]:
    return library.names(_OPERATOR)


def _operator_stubs(names: frozenset[str]) -> Iterable[str]:
    sizes = {name for name in names if name.endswith(_SIZE)}
    sizes |= {f"{name}Get{_SIZE}" for name in names - sizes}
    for name in sorted(names - sizes):
        yield f'int {name}(void) {{ return sim_launch("{name}"); }}\n'
    for name in sorted(sizes):
        yield f"int {name}(void) {{ return 0; }}\n"


def _compile(folder: Path, name: str, sources: list[str], options: list[str]) -> None:
    command = [compiler(), "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", name, *sources, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SimulatorError(f"the stub library {name} cannot be built: {' '.join(command)}\n{done.stderr.strip()}")


def _digest(package: Path) -> str:
    parts = [SOURCE.read_bytes(), Path(__file__).read_bytes(), compiler().encode()]
    for path in _libraries(package):
        status = path.stat()
        parts.append(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def check_versions() -> None:
    """Torch and torch_npu must be of the same minor release.

    Raises:
        Unavailable: they differ, or one is missing.
    """
    try:
        torch, torch_npu = metadata.version("torch"), metadata.version("torch-npu")
    except metadata.PackageNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    if torch.split(".")[:2] != torch_npu.split(".")[:2]:
        raise Unavailable(
            f"torch {torch} and torch_npu {torch_npu} do not fit; install torch-npu {torch.split('+')[0]}"
        )
