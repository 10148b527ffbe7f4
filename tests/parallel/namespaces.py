"""Two hosts of their own network on this machine: Linux network namespaces that a cable joins."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Host:
    """One end of the cable.

    Attributes:
        name: of the namespace.
        address: of its interface.
        interface: which the cable is in.
    """

    name: str
    address: str
    interface: str

    def command(self, *arguments: str) -> list[str]:
        """A command as it runs on this host."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def unplug(self) -> None:
        """Cut the cable: nothing arrives any more, and nobody is told."""
        _run(*self.command("ip", "link", "set", self.interface, "down"))


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other; the test is skipped where they cannot be made, for the reason that is told."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2) to make network namespaces with")
    hosts = tuple(Host(f"zoo{side}{os.getpid()}", f"10.231.7.{side}", f"zv{side}{os.getpid()}") for side in (1, 2))
    first, second = hosts
    try:
        try:
            for host in hosts:
                _run("ip", "netns", "add", host.name)
            _run("ip", "link", "add", first.interface, "type", "veth", "peer", "name", second.interface)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for host in hosts:
            _run("ip", "link", "set", host.interface, "netns", host.name)
            _run(*host.command("ip", "address", "add", f"{host.address}/24", "dev", host.interface))
            _run(*host.command("ip", "link", "set", host.interface, "up"))
            _run(*host.command("ip", "link", "set", "lo", "up"))
        yield first, second
    finally:
        for command in (("link", "del", first.interface), *(("netns", "del", host.name) for host in hosts)):
            subprocess.run(["ip", *command], capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)
