"""This host's address as the other hosts of a run reach it."""

from __future__ import annotations

import ipaddress
import socket

from npu_zoo.core.errors import HardwareError

_ELSEWHERE = "192.0.2.1"
"""An address of no host (RFC 5737); the route to it is the one that leads out."""

_DISCARD = 9


def local_address(master_addr: str, num_nodes: int = 2) -> str:
    """The address of the interface that faces the host of rank 0, or that rank 0's host has there itself.

    Nothing is sent: the kernel is asked for the route. Where rank 0's own name means the loopback interface, as Debian
    writes it into ``/etc/hosts``, and there are other nodes, the address of the route that leads out is taken.

    Args:
        master_addr: rank 0's host, as all ranks have it.
        num_nodes: hosts of the run.

    Raises:
        HardwareError: the name means nothing here, or no route leads there.
    """
    try:
        found = socket.getaddrinfo(master_addr, _DISCARD, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise HardwareError(f"MASTER_ADDR={master_addr} means no host here: {error}; give its address") from error
    addresses = [address for family, *_, place in found if (address := _source(family, place))]
    if not addresses:
        raise HardwareError(f"no route leads to MASTER_ADDR={master_addr}; look at `ip route get {found[0][4][0]}`")
    if num_nodes > 1 and ipaddress.ip_address(addresses[0].partition("%")[0]).is_loopback:
        return _source(socket.AF_INET, (_ELSEWHERE, _DISCARD)) or addresses[0]
    return addresses[0]


def _source(family: int, place: tuple[object, ...]) -> str:
    """The address that packets to a place would come from; empty where there is no route."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def is_this_host(name: str) -> bool:
    """Whether a name or address is one of this host's own."""
    try:
        found = socket.getaddrinfo(name, _DISCARD, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, *_, place in found:
        loopback = ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback
        if loopback or _source(family, place) == place[0]:
            return True
    return False
