"""Python and the packages of torch, torch_npu and transformers: what is installed, of which versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from npu_zoo.platforms.findings import Finding
from npu_zoo.platforms.versions import PYTHON, SUPPORTED, minor, numbers, pythons_of


@dataclass(frozen=True)
class Package:
    """An installed package.

    Attributes:
        version: as its metadata says; empty where there is none.
        folder: where its code lies; None where it is missing.
    """

    version: str
    folder: Path | None


def installed_packages() -> dict[str, Package]:
    """Those of torch, torch_npu and transformers that this Python has; none is imported."""
    found = {name: Package(_version(name), _folder(name)) for name in SUPPORTED}
    return {name: package for name, package in found.items() if package.version or package.folder}


def check_python(version: str, torch_npu: str = "") -> Finding:
    """The Python that runs, against npu-zoo's own need and the wheels of an installed torch_npu."""
    if numbers(version) < numbers(PYTHON):
        message = f"Python {version}; npu-zoo needs {PYTHON} or newer"
        return Finding("python", "problem", message, f"make an environment with Python {PYTHON} or newer")
    built_for = pythons_of(torch_npu)
    if built_for and minor(version) not in built_for:
        message = f"Python {version}; torch_npu {minor(torch_npu)} is built for {built_for[0]} to {built_for[-1]}"
        return Finding("python", "warning", message, f"make an environment with Python {built_for[-1]}")
    return Finding("python", "ok", f"Python {version}")


def check_packages(packages: Mapping[str, Package], *, needed: bool) -> list[Finding]:
    """The packages' versions, against what npu-zoo takes and against each other.

    Args:
        packages: what :func:`installed_packages` finds.
        needed: whether an NPU is to be used.
    """
    findings = [_check_package(name, packages.get(name), needed=needed) for name in SUPPORTED]
    return [*findings, *_check_pair(packages)]


def _check_package(name: str, package: Package | None, *, needed: bool) -> Finding:
    install = install_command(npu=needed or name == "torch_npu")
    if package is None:
        if name == "torch_npu" and not needed:
            return Finding(name, "note", "not installed; it is for Ascend devices alone")
        return Finding(name, "problem" if needed else "warning", f"not installed; {_WITHOUT[name]}", install)
    if package.folder is None:
        return Finding(name, "problem", f"{package.version} is registered, and its code is not there", install)
    if not package.version:
        return Finding(
            name, "warning", f"{package.folder} is no installed package: its version cannot be told", install
        )
    if not SUPPORTED[name].holds(package.version):
        message = f"{name} {package.version}; npu-zoo takes {SUPPORTED[name]}"
        return Finding(name, "problem", message, f"pip install '{name.replace('_', '-')}{SUPPORTED[name]}'")
    return Finding(name, "ok", f"{name} {package.version}")


_WITHOUT = {
    "torch": "list, matrix, check, explain and doctor work without it, nothing runs",
    "torch_npu": "nothing runs on an Ascend device without it",
    "transformers": "chat templates and checkpoints without a tokenizer.json need it",
}


def _check_pair(packages: Mapping[str, Package]) -> list[Finding]:
    torch, npu = (packages.get(name, Package("", None)).version for name in ("torch", "torch_npu"))
    if not torch or not npu or numbers(torch)[:3] == numbers(npu)[:3]:
        return []
    message = f"torch {torch} and torch_npu {npu} are not of one release"
    if minor(torch) == minor(npu):
        return [Finding("torch_npu", "warning", message, pair_command(npu))]
    return [Finding("torch_npu", "problem", f"{message}; an import ends with an undefined symbol", pair_command(npu))]


def install_command(*, npu: bool) -> str:
    """The command that installs what a run needs beside npu-zoo itself."""
    return f"pip install 'npu-zoo[{'npu' if npu else 'run'}]'"


def pair_command(torch_npu: str) -> str:
    """The command that installs the torch that a torch_npu is made for."""
    exact = ".".join(map(str, numbers(torch_npu)[:3]))
    return f"pip install torch=={exact} torch-npu=={torch_npu.partition('+')[0]}" if exact else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name) or ""
    except (importlib.metadata.PackageNotFoundError, KeyError):  # KeyError: metadata without a version
        return ""


def _folder(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: something in sys.modules that was not imported
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None
