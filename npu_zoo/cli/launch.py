"""``launch``: start a command's ranks on this node, where the run may have others."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import HardwareError, UsageError
from npu_zoo.core.hardware import chip_of
from npu_zoo.parallel.addresses import is_this_host, local_address
from npu_zoo.parallel.environment import LAUNCHED_VARIABLES
from npu_zoo.parallel.ports import choose_master_port, launch_ports, require_launch
from npu_zoo.platforms.ports import HIGHEST, MASTER_PORT, free_port, port_in_use, port_users
from npu_zoo.registry import get_registry
from npu_zoo.request import Request, read_request
from npu_zoo.settings import load_settings

CONTEXT = {"allow_interspersed_args": False}
"""The options of the command that is launched are its own."""

_THIS_HOST = "127.0.0.1"
_TRIES = 5


def _option(help_text: str, flag: str, metavar: str) -> Any:
    return typer.Option(flag, help=help_text, metavar=metavar)


def launch(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND …", help="A command of npu-zoo, with its options.")],
    nnodes: Annotated[int, _option("Nodes of the run.", "--nnodes", "N")] = 1,
    node_rank: Annotated[
        int | None, _option("This node's number, from 0. Default: the nodes agree on it.", "--node-rank", "K")
    ] = None,
    nproc_per_node: Annotated[
        int | None, _option("Ranks of each node. Default: the command's ranks over N.", "--nproc-per-node", "M")
    ] = None,
    master_addr: Annotated[
        str | None, _option("Where the nodes meet: node 0's address. Default: MASTER_ADDR.", "--master-addr", "A")
    ] = None,
    master_port: Annotated[
        int | None, _option(f"The port there. Default: MASTER_PORT, or {MASTER_PORT}.", "--master-port", "P")
    ] = None,
    max_restarts: Annotated[int, _option("Start all ranks anew that often.", "--max-restarts", "R")] = 0,
    rdzv_id: Annotated[str, _option("A name of the run that its nodes share.", "--rdzv-id", "ID")] = "npu-zoo",
) -> None:
    """Start the ranks of a command on this node, and on each other node by the same command there.

    `npu-zoo launch --nnodes 2 --node-rank K --master-addr A -- run --model FAMILY --tp 2 --pp 2`

    Results come from rank 0 alone; what other ranks say on standard error begins with their number. A single node needs
    no launch: `npu-zoo run` starts its ranks itself.
    """
    _refuse_nesting(command)
    _check_numbers(nnodes, node_rank, max_restarts)
    request = _request(command)
    nproc = _ranks_per_node(request, nnodes, nproc_per_node)
    environ = {**os.environ, **({} if master_addr is None else {"MASTER_ADDR": master_addr})}
    environ |= {} if master_port is None else {"MASTER_PORT": str(master_port)}
    nodes = _Nodes(nnodes, 0 if nnodes == 1 else node_rank, nproc, environ)
    code = _start(nodes, request, (max_restarts, rdzv_id, tuple(command)))
    if code:
        raise typer.Exit(code)


def _start(nodes: _Nodes, request: Request | None, run: tuple[int, str, tuple[str, ...]]) -> int:
    """Start the ranks of this node, and return the exit code; a port that is lost on the way is replaced."""
    meeting = nodes.meeting(request)
    os.environ["PYTHONPATH"] = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it is read when torch is imported
    from npu_zoo.cli.elastic import Launch, PortTaken, start

    for _ in range(_TRIES - 1):
        try:
            return start(Launch(nodes.nnodes, nodes.node_rank, nodes.nproc, *meeting, *run))
        except PortTaken:
            if not nodes.may_move:
                raise
            meeting = nodes.meeting(request)
    return start(Launch(nodes.nnodes, nodes.node_rank, nodes.nproc, *meeting, *run))


class _Meeting(NamedTuple):
    """Where the nodes meet.

    Attributes:
        leads: whether this one holds the port.
        address, port: see above.
        local_address: this node's, as the others reach it.
    """

    leads: bool
    address: str
    port: int
    local_address: str


@dataclass(frozen=True)
class _Nodes:
    """The nodes of the run, and this one's number and environment."""

    nnodes: int
    node_rank: int | None
    nproc: int
    environ: Mapping[str, str]

    @property
    def may_move(self) -> bool:
        """Whether another port may be taken, as nobody else has to know it."""
        return self.nnodes == 1 and not self._value("MASTER_PORT")

    def meeting(self, request: Request | None) -> _Meeting:
        """Where the nodes meet, after a look at the ports of this one.

        Raises:
            UsageError: other nodes could not know where.
            HardwareError: a port is taken; names by whom.
        """
        reserved = self._device_ports(request)
        if self.nnodes == 1:
            port = choose_master_port(self.environ, reserved=reserved).port
            return _Meeting(True, _THIS_HOST, port, _THIS_HOST)
        address, asked = self._value("MASTER_ADDR"), self._value("MASTER_PORT") or str(MASTER_PORT)
        if not address:
            raise UsageError(
                f"{self.nnodes} nodes have to know where they meet: give --master-addr, node 0's, on each of them"
            )
        if not asked.isascii() or not asked.isdecimal() or not 0 < int(asked) <= HIGHEST:
            raise HardwareError(f"MASTER_PORT={asked} is no port; export MASTER_PORT={MASTER_PORT}, or unset it")
        leads = is_this_host(address) if self.node_rank is None else self.node_rank == 0
        if leads:
            _require_free(int(asked))
        return _Meeting(leads, address, int(asked), local_address(address, self.nnodes))

    def _device_ports(self, request: Request | None) -> set[int]:
        """The ports that the ranks' devices take on this node; those are free."""
        if request is None or chip_of(request.hardware).device != "npu":
            return set()
        found = launch_ports(self.nnodes * self.nproc, request.hardware, self.environ)[1:]  # the first: the meeting
        require_launch(found)
        return {port for ports in found for port in ports.ports}

    def _value(self, name: str) -> str:
        return self.environ.get(name, "").strip()


def _refuse_nesting(command: list[str]) -> None:
    found = [name for name in LAUNCHED_VARIABLES if os.environ.get(name)]
    if found:
        raise UsageError(
            f"a launcher has started this process already ({', '.join(found)}); "
            f"give it `npu-zoo {command[0]} …` itself, or unset {', '.join(found)}"
        )
    if command[0] == "launch":
        raise UsageError("launch cannot be launched; one is enough")


def _check_numbers(nnodes: int, node_rank: int | None, max_restarts: int) -> None:
    if nnodes < 1:
        raise UsageError(f"--nnodes {nnodes}: there is 1 node at least")
    if node_rank is not None and not 0 <= node_rank < nnodes:
        raise UsageError(f"--node-rank {node_rank}: the {nnodes} node(s) are numbered from 0 to {nnodes - 1}")
    if max_restarts < 0:
        raise UsageError(f"--max-restarts {max_restarts}: 0 at least")


def _request(command: list[str]) -> Request | None:
    """What the command asks for; None where it takes no request."""
    from npu_zoo.cli.app import find_command

    found, name, rest = find_command(command[0]), command[0], command[1:]
    while rest and hasattr(found, "commands"):
        found, name, rest = found.commands.get(rest[0]), f"{name} {rest[0]}", rest[1:]
    if found is None:
        raise UsageError(f"there is no command '{name}' to launch; `npu-zoo --help` lists them")
    with found.make_context(name, rest, resilient_parsing=True) as context:
        values = dict(context.params)
    if "model" not in values:
        return None
    flags = {name: value for name, value in values.items() if name in EngineArgs.model_fields}
    settings = load_settings(flags, values.get("config_file"), os.environ)
    return read_request(settings.args, get_registry())


def _ranks_per_node(request: Request | None, nnodes: int, asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise UsageError(f"--nproc-per-node {asked}: there is 1 rank at least")
    if request is None:
        if asked is None:
            raise UsageError("the command does not say how many ranks it takes; give --nproc-per-node")
        return asked
    size = request.world_size
    if asked is not None and asked * nnodes != size:
        ranks = f"{nnodes} node(s) of {asked} make {asked * nnodes} ranks"
        raise UsageError(f"{ranks}, and the command takes {size}: change --tp, --pp or --world-size, or the nodes")
    if size % nnodes:
        raise UsageError(f"{size} ranks cannot be spread evenly over {nnodes} nodes: change --nnodes, --tp or --pp")
    return size // nnodes


def _require_free(port: int) -> None:
    """Refuse a port that is taken: all nodes have to agree on it, so no other is looked for."""
    if port_in_use(port):
        users = ", ".join(map(str, port_users(port))) or "a process that this user may not see"
        raise HardwareError(
            f"port {port}, where the nodes would meet, is taken by {users}; "
            f"give all nodes another one: --master-port {free_port(port + 1) or 'P'}"
        )
