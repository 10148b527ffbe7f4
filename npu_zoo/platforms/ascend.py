"""What can be told of Ascend devices without torch: device files, npu-smi, the environment."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from npu_zoo.core.errors import HardwareError
from npu_zoo.core.hardware import CHIPS, PRODUCTS, Chip

VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"
_MIB = 1 << 20
_TIMEOUT = 20


@dataclass(frozen=True)
class AscendDevice:
    """One device, which is one die of a card.

    Attributes:
        card: the card's number as npu-smi shows it.
        soc: the SoC's name without the ``Ascend`` prefix, such as ``910B4``.
        memory, used: bytes.
    """

    card: int
    soc: str
    memory: int
    used: int


def ascend_devices(dev: Path = Path("/dev")) -> list[int]:
    """Numbers of the Ascend devices that the driver shows, in order."""
    found = (re.fullmatch(r"davinci(\d+)", path.name) for path in dev.glob("davinci*"))
    return sorted(int(match.group(1)) for match in found if match)


@functools.cache
def run_npu_smi() -> str:
    """What ``npu-smi info`` printed when this process first asked; empty where it is not installed, fails or hangs."""
    program = shutil.which("npu-smi") or shutil.which("npu-smi", path="/usr/local/sbin:/usr/local/bin")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, "info"], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_npu_smi(text: str) -> list[AscendDevice]:
    """The devices in the table of ``npu-smi info``: a line with the card's name, then one with the chip's memory."""
    devices: list[AscendDevice] = []
    pending: tuple[int, str] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3:
            pending = None
            continue
        card = re.fullmatch(r"(\d+)\s+(?:Ascend)?(\d{3}[\w-]*)", cells[0])
        if card:
            pending = int(card.group(1)), card.group(2)
        elif pending is not None and re.fullmatch(r"\d+(\s+\d+)?", cells[0]):
            usage = [(int(used), int(size)) for used, size in re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])]
            used, size = max(usage, key=lambda pair: pair[1], default=(0, 0))
            devices.append(AscendDevice(*pending, size * _MIB, used * _MIB))
            pending = None
    return devices


def chip_of_soc(soc: str) -> Chip:
    """The chip of a SoC's name.

    Raises:
        HardwareError: the zoo does not know it.
    """
    name = soc.removeprefix("Ascend")
    found = next((chip for chip in CHIPS.values() if name in chip.soc_names), None)
    if found is None:
        known = ", ".join(name for chip in CHIPS.values() for name in chip.soc_names)
        raise HardwareError(f"this machine has the SoC {soc}, which npu-zoo does not support; it knows {known}")
    return found


def products_of(chip: Chip) -> tuple[str, ...]:
    """The products with a chip."""
    return tuple(name for name, product in PRODUCTS.items() if product.chip == chip.name)


def detect_ascend(dev: Path = Path("/dev"), npu_smi: Callable[[], str] = run_npu_smi) -> tuple[str, ...]:
    """The products that this machine can be; none where it has no Ascend device.

    Raises:
        HardwareError: there are devices whose SoC is unknown, or of several chips.
    """
    numbers = ascend_devices(dev)
    if not numbers:
        return ()
    chips = {chip_of_soc(device.soc).name for device in parse_npu_smi(npu_smi())}
    if len(chips) > 1:
        raise HardwareError(
            f"this machine has Ascend devices of several chips ({', '.join(sorted(chips))}); name what to run on with "
            f"--hardware, and choose its devices with {VISIBLE_DEVICES}"
        )
    if not chips:  # no npu-smi: the device files do not tell
        return tuple(name for name, product in PRODUCTS.items() if product.chip.startswith("ascend"))
    return products_of(CHIPS[chips.pop()])


def visible_devices(environ: Mapping[str, str], count: int | None) -> list[int] | None:
    """The devices that ``ASCEND_RT_VISIBLE_DEVICES`` leaves, in its order; None where it is unset.

    Args:
        environ: the environment.
        count: how many devices there are, where that is known.

    Raises:
        HardwareError: it is no list of numbers, names a device twice, or one that there is not.
    """
    value = environ.get(VISIBLE_DEVICES)
    if value is None or not value.strip():
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise HardwareError(f"{VISIBLE_DEVICES}={value} is no list of device numbers; write 0,1,2")
    numbers = [int(part) for part in parts]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise HardwareError(f"{VISIBLE_DEVICES}={value} names device {twice[0]} twice")
    if count is not None and max(numbers) >= count:
        raise HardwareError(f"{VISIBLE_DEVICES}={value} names device {max(numbers)}; this machine has 0 to {count - 1}")
    return numbers
