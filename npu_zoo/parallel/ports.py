"""The TCP ports that the ranks of a run take on this machine, chosen and looked at before the start."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from npu_zoo.core.errors import HardwareError, UsageError
from npu_zoo.core.hardware import chip_of
from npu_zoo.platforms.ports import (
    HCCL_BASE_PORT,
    HCCL_BASE_PORTS,
    HCCL_NPU_PORT,
    HIGHEST,
    MASTER_PORT,
    PortUser,
    free_hccl_base,
    free_port,
    hccl_ports,
    parse_port_range,
    port_in_use,
    port_users,
)

ADVISED = range(20000, 20051)
"""Where MindIE's documentation advises to put ``MASTER_PORT``."""

_WITHOUT_RANGES = frozenset({"ascend310p"})
"""Chips on which HCCL reads neither of its two port ranges; their pages, supported products."""

InUse = Callable[[int], bool]
Users = Callable[[int], Sequence[PortUser]]


@dataclass(frozen=True)
class PortChoice:
    """Where the ranks of a run meet.

    Attributes:
        port: a TCP port that nothing listened on when it was chosen.
        source: ``MASTER_PORT`` of the environment, the ``default``, or ``found`` as the default is taken.
        note: what to tell the user; empty where there is nothing to tell.
    """

    port: int
    source: Literal["MASTER_PORT", "default", "found"]
    note: str = ""


@dataclass(frozen=True)
class LaunchPort:
    """Ports that a launch takes for one purpose.

    Attributes:
        ports: the ports; empty where the system chooses them.
        purpose: what they are for.
        source: the variable that names them, or ``default`` or ``found``.
        taken: those that something listens on.
        users: who does, as far as this user may see.
        problem: why the launch would fail; empty where it would not.
        advice: what to do about the problem.
        note: what else there is to know.
    """

    ports: tuple[int, ...]
    purpose: str
    source: str
    taken: tuple[int, ...] = ()
    users: tuple[PortUser, ...] = ()
    problem: str = ""
    advice: str = ""
    note: str = ""


def choose_master_port(
    environ: Mapping[str, str],
    in_use: InUse = port_in_use,
    users: Users = port_users,
    reserved: Collection[int] = (),
) -> PortChoice:
    """The port on which the ranks meet; for whoever starts rank 0, which listens on it afterwards.

    ``MASTER_PORT`` is taken as it is. Unset, it is 20030, or the next free port of 20000 to 20050, or any other that is
    free. A port that was found can be taken by somebody else before rank 0 listens on it.

    Args:
        environ: the environment.
        in_use, users: whether a port is listened on, and by whom.
        reserved: ports that the launch needs for something else.

    Raises:
        HardwareError: ``MASTER_PORT`` is no port, is in use or is reserved, or no port is free.
    """
    choice = _Look(environ, in_use, users).choose(reserved)
    if isinstance(choice, _Fault):
        raise HardwareError(f"{choice.problem}; {choice.advice}")
    return choice


def launch_ports(
    world_size: int,
    hardware: str,
    environ: Mapping[str, str],
    in_use: InUse = port_in_use,
    users: Users = port_users,
) -> list[LaunchPort]:
    """The ports that a launch takes on this machine, each with what is wrong with it; none for a single rank.

    Args:
        world_size: ranks of the run.
        hardware: the product that it runs on; ports of HCCL are taken on NPUs alone.
        environ: the environment.
        in_use, users: whether a port is listened on, and by whom.

    Raises:
        UsageError: there is no such world size.
    """
    if world_size < 1:
        raise UsageError(f"world size {world_size}: there is 1 rank at least")
    if world_size == 1:
        return []
    look = _Look(environ, in_use, users)
    chip = chip_of(hardware)
    hccl = [look.host_side(chip.name), look.npu_side(chip.name)] if chip.device == "npu" else []
    return [look.master({port for found in hccl for port in found.ports}), *hccl]


def require_launch(ports: Sequence[LaunchPort]) -> None:
    """Refuse to start where ports are not to be had.

    Raises:
        HardwareError: with every problem at once, and what to do about each.
    """
    problems = [f"{found.problem}; {found.advice}" for found in ports if found.problem]
    if problems:
        raise HardwareError("the ranks cannot be started:\n  " + "\n  ".join(problems))


def describe_ports(ports: Sequence[int]) -> str:
    """Ports as a sentence shows them, such as ``60000-60031, 61000``."""
    runs: list[tuple[int, int]] = []
    for port in ports:
        if runs and port == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], port)
        else:
            runs.append((port, port))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


@dataclass(frozen=True)
class _Fault:
    """Why the ranks cannot meet on the port that was asked for, where it is one."""

    problem: str
    advice: str
    port: int | None = None


@dataclass(frozen=True)
class _Look:
    """One look at the ports of a launch."""

    environ: Mapping[str, str]
    in_use: InUse
    users: Users

    def choose(self, reserved: Collection[int]) -> PortChoice | _Fault:
        asked = self._value("MASTER_PORT")
        if asked and not _is_port(asked):
            return _Fault(f"MASTER_PORT={asked} is no port", f"export MASTER_PORT={MASTER_PORT}, or unset it")
        port = int(asked) if asked else MASTER_PORT
        why = self._why_not(port, reserved)
        if not why:
            return PortChoice(port, "MASTER_PORT" if asked else "default")
        other = self._other_port(reserved)
        if other is None:
            problem = f"port {port} is {why}, and no other TCP port of this machine is free for the ranks to meet on"
            return _Fault(problem, "end a process that listens", port)
        if asked:
            return _Fault(f"MASTER_PORT={port} is {why}", f"export MASTER_PORT={other}, or unset it", port)
        note = f"port {port} is {why}: the ranks meet on port {other}; other machines of the run need "
        return PortChoice(other, "found", f"{note}MASTER_PORT={other}")

    def master(self, reserved: Collection[int]) -> LaunchPort:
        purpose = "the ranks meet"
        choice = self.choose(reserved)
        if isinstance(choice, PortChoice):
            return LaunchPort((choice.port,), purpose, choice.source, note=choice.note)
        source = "MASTER_PORT" if self._value("MASTER_PORT") else "default"
        ports = (choice.port,) if choice.port else ()
        return self._look_at(ports, purpose, source, choice.problem, choice.advice)

    def host_side(self, chip: str) -> LaunchPort:
        purpose, name = "HCCL, at the host", "HCCL_HOST_SOCKET_PORT_RANGE"
        ranges = self._value(name)
        ignored = f"HCCL does not read {name} on this chip" if ranges and chip in _WITHOUT_RANGES else ""
        if ranges and not ignored:
            return self._range(name, ranges, purpose)
        asked = self._value("HCCL_IF_BASE_PORT")
        source = "HCCL_IF_BASE_PORT" if asked else "default"
        if asked and not (asked.isdecimal() and int(asked) in HCCL_BASE_PORTS):
            problem = f"HCCL_IF_BASE_PORT={asked} is no port from {HCCL_BASE_PORTS[0]} to {HCCL_BASE_PORTS[-1]}"
            return LaunchPort((), purpose, source, problem=problem, advice=f"export HCCL_IF_BASE_PORT={HCCL_BASE_PORT}")
        ports = tuple(hccl_ports(int(asked) if asked else HCCL_BASE_PORT))
        found = self._look_at(ports, purpose, source, note=ignored)
        if not found.taken:
            return found
        base = free_hccl_base(self.in_use)
        advice = f"export HCCL_IF_BASE_PORT={base}" if base else "end what listens on them"
        return replace(found, problem=_taken(found), advice=advice)

    def npu_side(self, chip: str) -> LaunchPort:
        purpose, name = "HCCL, at the NPU", "HCCL_NPU_SOCKET_PORT_RANGE"
        ranges = self._value(name)
        ignored = f"HCCL does not read {name} on this chip" if ranges and chip in _WITHOUT_RANGES else ""
        if ranges and not ignored:
            return self._range(name, ranges, purpose)
        # The port is one of the NPU's network card: a process of the host that listens on it may be another run.
        found = self._look_at((HCCL_NPU_PORT,), purpose, "default", note=ignored)
        if not found.taken:
            return found
        advice = "" if chip in _WITHOUT_RANGES else f"; where it uses the same NPUs, export {name}=auto in every rank"
        return replace(found, note=f"{_taken(found)} at the host{advice}" + (f"; {ignored}" if ignored else ""))

    def _range(self, name: str, value: str, purpose: str) -> LaunchPort:
        """HCCL takes the first port of a range that is free, so all of them must be taken for a launch to fail."""
        if value == "auto":
            return LaunchPort((), purpose, name, note="the system chooses")
        ports = parse_port_range(value)
        if ports is None:
            problem = f"{name}={value} is no list of ports such as 60000,60050-60100"
            return LaunchPort((), purpose, name, problem=problem, advice=f"export {name}=auto")
        found = self._look_at(tuple(ports), purpose, name)
        if len(found.taken) < len(ports):
            return found
        return replace(found, problem=_taken(found), advice=f"export {name}=auto")

    def _look_at(
        self, ports: tuple[int, ...], purpose: str, source: str, problem: str = "", advice: str = "", note: str = ""
    ) -> LaunchPort:
        taken = tuple(port for port in ports if self.in_use(port))
        users = tuple(dict.fromkeys(user for port in taken for user in self.users(port)))
        return LaunchPort(ports, purpose, source, taken, users, problem, advice, note)

    def _why_not(self, port: int, reserved: Collection[int]) -> str:
        """Why the ranks cannot meet on a port; empty where they can."""
        if port in reserved:
            return "one of those that HCCL takes"
        return f"taken by {_names(self.users(port))}" if self.in_use(port) else ""

    def _other_port(self, reserved: Collection[int]) -> int | None:
        """The next free port of those that are advised, else any that is free and not for root alone."""

        def unfit(port: int) -> bool:
            return port in reserved or self.in_use(port)

        stretches = (
            (MASTER_PORT, ADVISED[-1]),
            (ADVISED[0], MASTER_PORT - 1),
            (ADVISED[-1] + 1, HIGHEST),
            (1024, ADVISED[0] - 1),
        )
        ports = (free_port(first, last, unfit) for first, last in stretches)
        return next((port for port in ports if port is not None), None)

    def _value(self, name: str) -> str:
        return self.environ.get(name, "").strip()


def _taken(found: LaunchPort) -> str:
    """What is wrong with ports that are taken."""
    shown = f"ports {describe_ports(found.taken)} are" if len(found.taken) > 1 else f"port {found.taken[0]} is"
    origin = "" if found.source == "default" else f" ({found.source})"
    return f"HCCL needs {describe_ports(found.ports)}{origin}, and {shown} taken by {_names(found.users)}"


def _names(users: Sequence[PortUser]) -> str:
    return ", ".join(map(str, users)) or "a process that this user may not see"


def _is_port(value: str) -> bool:
    return value.isascii() and value.isdecimal() and len(value) <= len(str(HIGHEST)) and 0 < int(value) <= HIGHEST
