"""TCP ports that runs on several devices need: which they are, whether they are taken, and by whom."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from npu_zoo.platforms.findings import Finding

MASTER_PORT = 20030
"""Where ranks meet, unless ``MASTER_PORT`` names another port; the MindIE model zoo's default."""

HCCL_BASE_PORT = 60000
HCCL_PORTS = 32
"""HCCL takes this many ports of the host from ``HCCL_IF_BASE_PORT`` on; its documentation since CANN 8.2, 16 before."""

HCCL_BASE_PORTS = range(1024, 65521)
"""What ``HCCL_IF_BASE_PORT`` may be; the same page."""

HCCL_NPU_PORT = 16666
"""The port of HCCL on the NPU's side, unless ``HCCL_NPU_SOCKET_PORT_RANGE`` names others; the same reference."""

HIGHEST = 65535
_LISTENING = "0A"


@dataclass(frozen=True)
class PortUser:
    """A process that listens on a port."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})"


def hccl_ports(base: int) -> range:
    """The ports of the host that HCCL takes from a base port on, up to the highest that there is."""
    return range(base, min(base + HCCL_PORTS, HIGHEST + 1))


def free_hccl_base(in_use: Callable[[int], bool]) -> int | None:
    """The first of a stretch of free ports for HCCL, above the usual base where it can be; None where all are taken."""
    above = range(HCCL_BASE_PORT, HIGHEST - HCCL_PORTS, HCCL_PORTS)
    below = range(HCCL_BASE_PORTS[0], HCCL_BASE_PORT, HCCL_PORTS)
    stretches = (hccl_ports(base) for base in (*above, *reversed(below)))
    return next((ports[0] for ports in stretches if not any(map(in_use, ports))), None)


def port_in_use(port: int) -> bool:
    """Whether something of this machine listens on a TCP port, on any address.

    Nothing is sent: the port is bound for a moment, as who wants to listen on it would.
    """
    return _is_bound(socket.AF_INET, "0.0.0.0", port) or _is_bound(socket.AF_INET6, "::", port)


def free_port(first: int, last: int = HIGHEST, in_use: Callable[[int], bool] = port_in_use) -> int | None:
    """The first port of a range that nothing listens on."""
    return next((port for port in range(first, last + 1) if not in_use(port)), None)


def port_users(port: int, proc: Path = Path("/proc")) -> list[PortUser]:
    """The processes that listen on a TCP port, as far as this user may see them."""
    sockets = {inode for name in ("tcp", "tcp6") for inode in _listeners(proc / "net" / name, port)}
    if not sockets:
        return []
    pids = sorted(int(folder.name) for folder in proc.iterdir() if folder.name.isdecimal())
    return [PortUser(pid, _command(proc / str(pid))) for pid in pids if _has_socket(proc / str(pid), sockets)]


def check_ports(
    environ: Mapping[str, str],
    in_use: Callable[[int], bool] = port_in_use,
    users: Callable[[int], Sequence[PortUser]] = port_users,
) -> list[Finding]:
    """The ports that a run on several devices takes by its environment."""
    look = _Look(environ, in_use, users)
    return [look.master(), look.hccl(), look.npu_side()]


def parse_port_range(text: str) -> list[int] | None:
    """The ports of ``60000,60050-60100``; None where it is anything else."""
    ports: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        first = int(match.group(1)) if match else 0
        last = int(match.group(2) or first) if match else 0
        if not 0 < first <= last <= HIGHEST:
            return None
        ports += range(first, last + 1)
    return ports


@dataclass(frozen=True)
class _Look:
    """One look at the ports."""

    environ: Mapping[str, str]
    in_use: Callable[[int], bool]
    users: Callable[[int], Sequence[PortUser]]

    def master(self) -> Finding:
        value = self._value("MASTER_PORT")
        if value and not (value.isdecimal() and 0 < int(value) <= HIGHEST):
            advice = f"export MASTER_PORT={MASTER_PORT}, or another port"
            return Finding("ports", "problem", f"MASTER_PORT={value} is no port", advice)
        port = int(value) if value else MASTER_PORT
        name = "MASTER_PORT" if value else "where ranks meet, as MASTER_PORT is unset"
        if not self.in_use(port):
            return Finding("ports", "ok", f"port {port} is free ({name})")
        other = free_port(MASTER_PORT, in_use=self.in_use)
        return self._check(name, [port], f"export MASTER_PORT={other}" if other else "end what listens on it")

    def hccl(self) -> Finding:
        ranges, value = self._value("HCCL_HOST_SOCKET_PORT_RANGE"), self._value("HCCL_IF_BASE_PORT")
        if ranges:
            return self._range("HCCL_HOST_SOCKET_PORT_RANGE", ranges)
        if value and not (value.isdecimal() and int(value) in HCCL_BASE_PORTS):
            message = f"HCCL_IF_BASE_PORT={value} is no port from {HCCL_BASE_PORTS[0]} to {HCCL_BASE_PORTS[-1]}"
            return Finding("ports", "problem", message, f"export HCCL_IF_BASE_PORT={HCCL_BASE_PORT}")
        first = int(value) if value else HCCL_BASE_PORT
        name = "HCCL_IF_BASE_PORT" if value else "HCCL, as HCCL_IF_BASE_PORT is unset"
        return self._check(name, hccl_ports(first), f"export HCCL_IF_BASE_PORT={self._other_base()}")

    def _other_base(self) -> int | str:
        """The first of a stretch of free ports, above the usual one where it can be."""
        return free_hccl_base(self.in_use) or "PORT"

    def npu_side(self) -> Finding:
        value = self._value("HCCL_NPU_SOCKET_PORT_RANGE")
        if value:
            return self._range("HCCL_NPU_SOCKET_PORT_RANGE", value)
        name = "HCCL at the NPU, as HCCL_NPU_SOCKET_PORT_RANGE is unset"
        return self._check(name, [HCCL_NPU_PORT], "export HCCL_NPU_SOCKET_PORT_RANGE=auto, in every rank")

    def _value(self, name: str) -> str:
        return self.environ.get(name, "").strip()

    def _range(self, name: str, value: str) -> Finding:
        if value == "auto":
            return Finding("ports", "ok", f"{name}=auto: the system chooses")
        ports = parse_port_range(value)
        if ports is None:
            message = f"{name}={value} is no list of ports such as 60000,60050-60100"
            return Finding("ports", "problem", message, f"export {name}=auto")
        return self._check(name, ports, f"export {name}=auto")

    def _check(self, name: str, ports: Sequence[int], advice: str) -> Finding:
        one = len(ports) == 1
        shown = f"port {ports[0]}" if one else f"ports {ports[0]} to {ports[-1]}"
        taken = [port for port in ports if self.in_use(port)]
        if not taken:
            return Finding("ports", "ok", f"{shown} {'is' if one else 'are'} free ({name})")
        names = ", ".join(dict.fromkeys(str(user) for port in taken for user in self.users(port)))
        which = ", ".join(map(str, taken[:4])) + (f" and {len(taken) - 4} more" if len(taken) > 4 else "")
        are = f"{shown} is taken" if one else f"of {shown}, {which} {'is' if len(taken) == 1 else 'are'} taken"
        return Finding("ports", "warning", are + (f" by {names}" if names else "") + f" ({name})", advice)


def _is_bound(family: socket.AddressFamily, address: str, port: int) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not count
            if family is socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((address, port))
    except OSError as error:
        return error.errno == errno.EADDRINUSE  # else the family is missing, or the port is for root
    return False


def _listeners(table: Path, port: int) -> set[str]:
    """The inodes of the sockets that listen on a port, from the kernel's table."""
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return set()
    rows = [fields for line in lines if len(fields := line.split()) > 9]
    return {row[9] for row in rows if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port}


def _has_socket(process: Path, sockets: set[str]) -> bool:
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:  # another user's process, or one that has just ended
        return False
    return any(f"socket:[{inode}]" == _target(descriptor) for descriptor in descriptors for inode in sockets)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed since it was listed
        return ""


def _command(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return "a process"
