"""Starts the simulated runtime: nothing happens before torch is imported, and then it happens by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from npu_zoo.simulator.build import check_versions, package_folder, stub_folder
from npu_zoo.simulator.errors import SimulatorError
from npu_zoo.simulator.products import GIB, Machine, machine_of
from npu_zoo.simulator.runtime import Runtime

VARIABLE = "NPU_ZOO_SIMULATE"
DEVICES_VARIABLE = "NPU_ZOO_SIMULATE_DEVICES"
REPORT_VARIABLE = "NPU_ZOO_SIMULATE_REPORT"
MEMORY_VARIABLE = "NPU_ZOO_SIMULATE_MEMORY_GIB"

_MISSING_CANN = "ASCEND_HOME_PATH environment variable is not set"
_state: Activation | None = None


@dataclasses.dataclass
class Activation:
    """What was asked for, and the runtime as soon as torch has been imported."""

    machine: Machine
    runtime: Runtime | None = None


def activate(product: str, *, devices: int | None = None, memory: int | None = None) -> None:
    """Simulate a product in this process, from the import of torch on.

    Args:
        product: a name of :data:`~npu_zoo.simulator.products.MACHINES`.
        devices: how many devices it shows; the product's where None.
        memory: bytes of memory per device, rounded down to 2 MiB; the product's where None.

    Calling it again with the same arguments changes nothing.

    Raises:
        SimulatorError: the product is unknown, another one is simulated already, torch has been imported, or a real
            CANN or device is present.
        Unavailable: torch_npu or a C compiler is missing, or torch_npu does not fit torch.
    """
    global _state
    machine = _sized(machine_of(product), devices, memory)
    if _state is not None:
        if _state.machine != machine:
            raise SimulatorError(f"{_state.machine.name} is simulated already, and a process has one machine")
        return
    refuse_real_hardware(os.environ)
    if "torch" in sys.modules:
        raise SimulatorError("torch has been imported already; activate the simulated runtime before it")
    package_folder()
    check_versions()
    _state = Activation(machine)
    sys.meta_path.insert(0, _Finder())


def activate_from_environment() -> None:
    """:func:`activate` what ``NPU_ZOO_SIMULATE`` names; nothing where it is unset or empty.

    Raises:
        SimulatorError, Unavailable: as :func:`activate`; or a variable holds no number.
    """
    product = os.environ.get(VARIABLE, "").strip()
    if product:
        memory, devices = _number(MEMORY_VARIABLE), _number(DEVICES_VARIABLE)
        activate(
            product,
            devices=None if devices is None else int(devices),
            memory=None if memory is None else int(memory * GIB),
        )


def simulated_machine() -> Machine | None:
    """The machine that this process simulates, None where it simulates none."""
    return _state.machine if _state else None


def runtime() -> Runtime:
    """The loaded runtime.

    Raises:
        SimulatorError: nothing is simulated, or torch has not been imported yet.
    """
    if _state is None or _state.runtime is None:
        raise SimulatorError(f"no Ascend runtime is simulated in this process; set {VARIABLE} before torch is imported")
    return _state.runtime


def refuse_real_hardware(environ: Mapping[str, str], root: Path = Path("/")) -> None:
    """Refuse to run beside a real CANN or device, which the stub would hide.

    Raises:
        SimulatorError: names what was found.
    """
    found = [f"{name}={environ[name]}" for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if environ.get(name)]
    found += [str(path) for path in sorted((root / "dev").glob("davinci*"))]
    folders = [Path(entry) for entry in environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    found += [str(folder / "libascendcl.so") for folder in folders if (folder / "libascendcl.so").exists()]
    if found:
        raise SimulatorError(
            f"a real Ascend environment is present ({', '.join(found)}); the simulated runtime would hide it. "
            f"Unset {VARIABLE}, or use a shell without CANN"
        )


def _sized(machine: Machine, devices: int | None, memory: int | None) -> Machine:
    if devices is not None and not 1 <= devices <= 64:
        raise SimulatorError(f"{devices} devices cannot be simulated; 1 to 64 can")
    if memory is not None:
        memory = memory >> 21 << 21
        if memory <= 0:
            raise SimulatorError("a device needs at least 2 MiB of memory")
    return dataclasses.replace(machine, devices=devices or machine.devices, memory=memory or machine.memory)


def _number(variable: str) -> float | None:
    value = os.environ.get(variable, "").strip()
    try:
        return float(value) if value else None
    except ValueError:
        raise SimulatorError(f"{variable}={value} is no number") from None


def _load() -> None:
    assert _state is not None
    os.environ["TASK_QUEUE_ENABLE"] = (
        "0"  # with a queue, a failing kernel is reported too late and its result is garbage
    )
    _state.runtime = Runtime(stub_folder(package_folder()), _state.machine)


class _Finder(importlib.abc.MetaPathFinder):
    """Loads the stub before torch is imported, and puts the golden semantics under torch_npu after it was."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torch" and _state is not None and _state.runtime is None:
            _load()
        if fullname != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _InstallAfter(spec.loader)
        return spec


class _InstallAfter(importlib.abc.Loader):
    """Another loader, with the overrides installed once the module has run."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self._loader.exec_module(module)
        sys.stderr.writelines(line for line in printed.getvalue().splitlines(True) if _MISSING_CANN not in line)
        from npu_zoo.simulator.distributed import install_collectives
        from npu_zoo.simulator.overrides import install
        from npu_zoo.simulator.report import listen_to_marks, report_at_exit

        install_collectives(install(runtime()))
        listen_to_marks()
        if os.environ.get(REPORT_VARIABLE):
            report_at_exit(os.environ[REPORT_VARIABLE])
