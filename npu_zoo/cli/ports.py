"""``ports``: the TCP ports that a launch takes on this machine, and who has them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated

import typer

from npu_zoo.cli.help import json_output
from npu_zoo.cli.options import JsonFlag
from npu_zoo.cli.output import print_json, print_table
from npu_zoo.core.errors import HardwareError, UsageError
from npu_zoo.core.hardware import PRODUCTS
from npu_zoo.parallel.ports import LaunchPort, describe_ports, launch_ports
from npu_zoo.platforms.ascend import ascend_devices, visible_devices
from npu_zoo.platforms.detection import detect_products

UNFIT = 4
PORTS_KEYS: dict[str, str] = {
    "world_size": "Ranks of the launch.",
    "hardware": "The product that it is for.",
    "ports": "What it takes, one object for each purpose; none for a single rank.",
    "ports[].purpose": "What the ports are for.",
    "ports[].source": "The variable that names them, default, or found where the default is taken.",
    "ports[].ports": "The ports; empty where the system chooses.",
    "ports[].taken": "Those that something listens on.",
    "ports[].users": "Who listens, as far as this user may see: pid and command.",
    "ports[].problem": "Why the launch would fail; empty where it would not.",
    "ports[].advice": "What to do about it.",
    "ports[].note": "What else there is to know.",
}
"""What ``ports --json`` writes."""

_FEWEST = 2


def _complete_hardware(incomplete: str) -> list[str]:
    return [name for name in PRODUCTS if name.startswith(incomplete)]


@json_output(PORTS_KEYS)
def ports(
    world_size: Annotated[
        int | None,
        typer.Option(
            "--world-size", metavar="N", help="Ranks of the launch. Default: this machine's devices, 2 at least."
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="NAME",
            help="The product that it is for. Default: what this machine shows.",
            autocompletion=_complete_hardware,
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the TCP ports that a launch of several ranks takes on this machine, and what is in use.

    The environment decides them: MASTER_PORT, HCCL_IF_BASE_PORT, HCCL_HOST_SOCKET_PORT_RANGE and
    HCCL_NPU_SOCKET_PORT_RANGE. The exit code is 4 where the launch would fail.
    """
    product = _product(hardware)
    size = _default_size(product) if world_size is None else world_size
    found = launch_ports(size, product, os.environ)
    if as_json:
        print_json({"world_size": size, "hardware": product, "ports": [dataclasses.asdict(port) for port in found]})
    else:
        _print(size, product, found)
    if any(port.problem for port in found):
        raise typer.Exit(UNFIT)


def _product(hardware: str | None) -> str:
    if hardware is None:
        return detect_products()[0]
    if hardware not in PRODUCTS:
        raise UsageError(f"unknown hardware '{hardware}'; known: {', '.join(PRODUCTS)}")
    return hardware


def _default_size(product: str) -> int:
    """As many ranks as there are devices here, or in a full machine of the product."""
    files = ascend_devices()
    try:
        visible = visible_devices(os.environ, len(files) or None)
    except HardwareError:  # which doctor speaks of
        visible = None
    return max(_FEWEST, len(visible or files) or PRODUCTS[product].devices)


def _print(size: int, product: str, found: Sequence[LaunchPort]) -> None:
    if not found:
        print("a single rank takes no ports")
        return
    print(f"{size} ranks on {product} take on this machine:\n")
    print_table(["for", "ports", "from", "state"], [_row(port) for port in found])


def _row(port: LaunchPort) -> list[str]:
    state = "in use: " + describe_ports(port.taken) if port.taken else "free" if port.ports else ""
    users = ", ".join(map(str, port.users))
    lines = [f"{state} by {users}" if port.taken and users else state, port.problem, port.note]
    lines += [f"-> {port.advice}"] if port.advice else []
    return [port.purpose, describe_ports(port.ports), port.source, "\n".join(line for line in lines if line)]
