"""A look at everything that a run stands on, part by part; each part takes what it looks at as arguments."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from npu_zoo.core.errors import HardwareError
from npu_zoo.core.hardware import PRODUCTS
from npu_zoo.platforms.ascend import (
    VISIBLE_DEVICES,
    AscendDevice,
    ascend_devices,
    chip_of_soc,
    parse_npu_smi,
    products_of,
    run_npu_smi,
    visible_devices,
)
from npu_zoo.platforms.environment import near_misses
from npu_zoo.platforms.findings import Finding
from npu_zoo.platforms.imports import (
    AUTOLOAD,
    Probe,
    Remedies,
    check_imports,
    check_libgomp,
    preload_command,
    probe_imports,
)
from npu_zoo.platforms.operators import ATB_PREFIX, Needs, check_operators, npu_chips
from npu_zoo.platforms.packages import (
    Package,
    check_packages,
    check_python,
    install_command,
    installed_packages,
    pair_command,
)
from npu_zoo.platforms.ports import PortUser, check_ports, port_in_use, port_users
from npu_zoo.platforms.toolkit import (
    GUIDE,
    atb_command,
    can_open,
    cann_command,
    check_atb,
    check_cann,
    check_driver,
    check_kernels,
    driver_command,
)

_LITTLE = 0.1
"""The share of free memory below which a device is spoken of as taken."""

_GIB = 1 << 30
_SIMULATE = "NPU_ZOO_SIMULATE"


@dataclass(frozen=True)
class Machine:
    """What a look takes from the machine.

    Attributes:
        environ: the environment.
        packages: what is installed of torch, torch_npu and transformers.
        npu_smi: what ``npu-smi info`` prints; empty where it cannot be run.
        root: what paths are looked up below.
        python: the version of the Python that runs.
        architecture: such as ``aarch64``.
        probe: imports torch, and torch_npu where ``npu``, under an environment in a process of its own.
        may_open: whether this user may open a device file.
        port_in_use, port_users: whether a TCP port is taken, and by whom.
    """

    environ: Mapping[str, str]
    packages: Mapping[str, Package]
    npu_smi: str = ""
    root: Path = Path("/")
    python: str = field(default_factory=platform.python_version)
    architecture: str = field(default_factory=platform.machine)
    probe: Callable[[Mapping[str, str], bool], Probe] = lambda environ, npu: probe_imports(environ, npu=npu)
    may_open: Callable[[Path], bool] = can_open
    port_in_use: Callable[[int], bool] = port_in_use
    port_users: Callable[[int], Sequence[PortUser]] = port_users

    @property
    def devices(self) -> list[AscendDevice]:
        """The devices that npu-smi shows."""
        return parse_npu_smi(self.npu_smi)

    def version(self, package: str) -> str:
        """An installed package's version; empty where it is missing."""
        return self.packages[package].version if package in self.packages else ""

    def folder(self, package: str) -> Path | None:
        """Where an installed package's code lies."""
        return self.packages[package].folder if package in self.packages else None


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(environ=os.environ, packages=installed_packages(), npu_smi=run_npu_smi())


def chips_in_question(machine: Machine, hardware: str | None) -> tuple[str, ...]:
    """The NPUs to look at: a named product's, else those of the devices, else all where torch_npu is installed."""
    if hardware is not None:
        return tuple(chip for chip in npu_chips() if chip == PRODUCTS[hardware].chip)
    shown = {chip for device in machine.devices if (chip := _chip_or_none(device.soc))}
    if shown:
        return tuple(chip for chip in npu_chips() if chip in shown)
    return npu_chips() if "torch_npu" in machine.packages else ()


def examine(machine: Machine, hardware: str | None, needs: Mapping[str, Needs], who: str = "") -> list[Finding]:
    """Everything that can be told without loading a model, in the order in which it is to be set right.

    Args:
        machine: what is looked at.
        hardware: the product that is to be used; None takes what the machine shows.
        needs: by chip, the operators that are called there.
        who: whose needs they are, where they are a family's.
    """
    simulated = machine.environ.get(_SIMULATE, "")
    needed = PRODUCTS[hardware].chip in npu_chips() if hardware else bool(ascend_devices(machine.root / "dev"))
    findings = [check_python(machine.python, machine.version("torch_npu"))]
    findings += check_packages(machine.packages, needed=needed)
    findings += _check_imports(machine, needed=needed)
    torch = machine.folder("torch")
    if torch is not None:
        findings += check_libgomp(machine.environ, machine.architecture, torch, machine.root)
    if simulated:
        message = f"{_SIMULATE}={simulated}: a simulated device, which needs neither driver nor CANN"
        findings.append(Finding("devices", "note", message))
    elif needed or not hardware:
        findings += _check_below_torch(machine, hardware, needs, needed=needed)
    findings += _check_operators(machine, needs, who, needed=needed)
    findings += _check_environment(machine.environ)
    if needed:
        findings += check_ports(machine.environ, machine.port_in_use, machine.port_users)
    return findings


def _check_below_torch(
    machine: Machine, hardware: str | None, needs: Mapping[str, Needs], *, needed: bool
) -> list[Finding]:
    """Driver, devices and CANN."""
    root, environ, torch_npu = machine.root, machine.environ, machine.version("torch_npu")
    findings = check_driver(root, needed=needed, may_open=machine.may_open)
    if not needed:  # CANN may be there all the same, and nothing that is wrong with it matters
        cann = check_cann(root, environ, torch_npu, needed=False)
        return [*findings, *(replace(f, status="note") if f.status != "ok" else f for f in cann)]
    if ascend_devices(root / "dev"):
        findings += _check_devices(machine, hardware)
    certain = needs if hardware or machine.devices else {}  # without npu-smi the chip may be any
    findings += check_cann(root, environ, torch_npu, needed=True) + check_kernels(root, environ, certain)
    atb = any(operator.startswith(ATB_PREFIX) for chip in certain for operator in certain[chip])
    return [*findings, *check_atb(root, environ, needed=atb)]


def _check_imports(machine: Machine, *, needed: bool) -> list[Finding]:
    """Import what is installed; where torch fails with torch_npu in it, once more without."""
    if machine.folder("torch") is None:
        return []
    npu = machine.folder("torch_npu") is not None
    probe = machine.probe(machine.environ, npu)
    alone = None
    if npu and "torch" not in probe.imported:
        alone = machine.probe({**machine.environ, AUTOLOAD: "0"}, False)
    return check_imports(probe, alone, _remedies(machine), npu=npu, needed=needed)


def _remedies(machine: Machine) -> Remedies:
    return Remedies(
        cann=cann_command(machine.root, machine.environ),
        driver=driver_command(machine.root),
        atb=atb_command(machine.root, machine.environ),
        preload=preload_command(machine.folder("torch"), machine.root),
        pair=pair_command(machine.version("torch_npu")) or f"install a pair of the table: {GUIDE}",
        install=install_command(npu=machine.folder("torch_npu") is not None),
    )


def _check_devices(machine: Machine, hardware: str | None) -> list[Finding]:
    """What npu-smi says of the devices, and what the environment leaves of them."""
    files, devices = ascend_devices(machine.root / "dev"), machine.devices
    if not devices:
        message = f"{len(files)} device files, and npu-smi tells nothing of them"
        advice = "npu-smi info; in a container: docker run -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi …"
        findings = [Finding("devices", "warning", message, advice)]
    else:
        findings = [_check_device(number, device, hardware) for number, device in enumerate(devices)]
        findings += _check_chips(devices)
        if len(files) != len(devices):
            message = f"{len(files)} device files (/dev/davinci*), and npu-smi shows {len(devices)} devices"
            findings.append(Finding("devices", "note", message))
    return [*findings, *_check_visible(machine.environ, len(files))]


def _check_device(number: int, device: AscendDevice, hardware: str | None) -> Finding:
    try:
        chip = chip_of_soc(device.soc)
    except HardwareError as error:
        return Finding("devices", "problem", f"device {number}: {error}", "run on the CPU: --hardware cpu")
    free = device.memory - device.used
    memory = f"{free / _GIB:.1f} of {device.memory / _GIB:.1f} GiB free"
    message = f"device {number} (card {device.card}): {device.soc}, {memory}"
    if hardware is not None and PRODUCTS[hardware].chip != chip.name:
        others = " or ".join(products_of(chip))
        message += f"; {hardware} was asked for, and this is a chip of {others}"
        return Finding("devices", "problem", message, f"--hardware {others}")
    if device.memory and free < _LITTLE * device.memory:
        advice = f"end what uses it (npu-smi info names it), or choose others: export {VISIBLE_DEVICES}=…"
        return Finding("devices", "warning", message, advice)
    return Finding("devices", "ok", message)


def _check_chips(devices: list[AscendDevice]) -> list[Finding]:
    chips = sorted({chip for device in devices if (chip := _chip_or_none(device.soc))})
    if len(chips) < 2:
        return []
    advice = f"name what to run on with --hardware, and its devices with {VISIBLE_DEVICES}"
    return [Finding("devices", "warning", f"devices of several chips: {', '.join(chips)}", advice)]


def _check_visible(environ: Mapping[str, str], count: int) -> list[Finding]:
    try:
        visible = visible_devices(environ, count)
    except HardwareError as error:
        return [Finding("devices", "problem", str(error), f"export {VISIBLE_DEVICES}=0, or unset it")]
    if visible is None:
        return []
    return [Finding("devices", "ok", f"{VISIBLE_DEVICES} leaves {', '.join(map(str, visible))}")]


def _check_operators(machine: Machine, needs: Mapping[str, Needs], who: str, *, needed: bool) -> list[Finding]:
    folder = machine.folder("torch_npu")
    if folder is None:  # which is spoken of already
        return []
    findings = [check_operators(folder, needs[chip], chip, who) for chip in needs]
    return findings if needed else [replace(f, status="note") if f.status != "ok" else f for f in findings]


def _check_environment(environ: Mapping[str, str]) -> list[Finding]:
    return [
        Finding("environment", "warning", f"nothing reads {name}", f"rename it, if {meant} is meant")
        for name, meant in near_misses(environ)
    ]


def _chip_or_none(soc: str) -> str | None:
    try:
        return chip_of_soc(soc).name
    except HardwareError:
        return None
