"""Groups of ranks over torch.distributed. torch is imported when a group is joined."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from npu_zoo.core.parallel import SINGLE, Communicator, Place, Ranks
from npu_zoo.parallel.collectives import CollectiveTimeout
from npu_zoo.parallel.device_groups import DeviceGroups
from npu_zoo.parallel.sends import Sends
from npu_zoo.parallel.traffic import Traffic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_IDLE = timedelta(days=365)
"""How long a rank waits for its next command: a server may have nothing to do."""
MEETING_TIMEOUT = timedelta(seconds=300)
"""How long ranks wait for each other when they make a group."""
LOOPBACK = "127.0.0.1"
_TIMED_OUT = "Timed out"
"""What gloo's errors say then; they are of no class of their own."""


class GlooGroup(Communicator):
    """Ranks of a CPU, or what ranks of any device tell each other beside their tensors.

    Args:
        store: where ranks find each other.
        kind: of the group, such as ``tp``.
        members: its ranks; of a kind each rank is in one group.
        rank: this one.
        timeout: of one operation; to meet takes as long as :data:`MEETING_TIMEOUT`.
        traffic: counts what is done; None where nobody asks.
        address: of this host, as the other ranks reach it; the host name's where None.
    """

    def __init__(
        self,
        store: Any,
        kind: str,
        members: Sequence[int],
        rank: int,
        timeout: timedelta,
        traffic: Traffic | None = None,
        address: str | None = None,
    ) -> None:
        distributed: Any = importlib.import_module("torch.distributed")
        self.rank, self.size = rank, size = members.index(rank), len(members)
        self._kind, self._members, self._traffic = kind, tuple(members), traffic or Traffic()
        self._timeout = timeout.total_seconds()
        self._sends = Sends()
        gloo = distributed.ProcessGroupGloo
        own = prefixed(store, f"{kind}/{members[0]}")
        if address is None:
            self._group = gloo(own, rank, size, MEETING_TIMEOUT)
        else:
            options = gloo._Options()
            options._timeout, options._threads = MEETING_TIMEOUT, 2
            options._devices = [gloo.create_device(hostname=address)]
            self._group = gloo(own, rank, size, options)
        self._group._set_default_timeout(timeout)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See :meth:`Communicator.all_reduce`."""
        x = x.contiguous()
        with self._operation("all_reduce", x):
            self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """See :meth:`Communicator.all_gather`."""
        import torch

        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self._operation("all_gather", x):
            self._group.allgather([parts], [x.contiguous()]).wait()
        return torch.cat(parts, dim)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See :meth:`Communicator.reduce_scatter`; gloo has none, so each rank sums what the others send it."""
        share = [len(x) // self.size] * self.size
        with self._operation("reduce_scatter", x):
            parts = self._exchange(x, share, share)
        return parts.view(self.size, share[0], *x.shape[1:]).sum(0)

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See :meth:`Communicator.all_to_all`."""
        with self._operation("all_to_all", x):
            return self._exchange(x, sent, received)

    def send(self, x: Tensor, to: int) -> None:
        """See :meth:`Communicator.send`."""
        x = x.contiguous()
        with self._operation("send", x):
            self._sends.add(self._group.send([x], to, 0), x)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        """See :meth:`Communicator.receive`."""
        import torch

        x = torch.empty(tuple(shape), dtype=dtype)
        with self._operation("receive", x):
            self._group.recv([x], source, 0).wait()
        return x

    def minimum(self, value: int) -> int:
        """The least of all ranks' numbers, on each of them."""
        import torch

        return int(self.all_gather(torch.tensor([value]), 0).min())

    def broadcast(self, value: Any = None) -> Any:
        """A picklable value of rank 0, on every rank."""
        import torch

        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) if self.rank == 0 else None
        size = torch.tensor([0 if data is None else len(data)])
        self._group.broadcast([size]).wait()
        data = torch.empty(int(size), dtype=torch.uint8) if data is None else data
        self._group.broadcast([data]).wait()
        return value if self.rank == 0 else pickle.loads(data.numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in their order, on each of them."""
        import torch

        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor([len(data)]), 0).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        rows = self.all_gather(padded.unsqueeze(0), 0)
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def abort(self) -> None:
        """End what is under way with an error, from any thread."""
        group = self._group
        if group is not None:
            group.abort()

    def close(self) -> None:
        """Leave the group, once what was sent has gone; its threads must not outlive the interpreter."""
        self._sends.finish()
        self.drop()

    def drop(self) -> None:
        """Leave the group after its operations have failed."""
        self._sends = Sends()
        self._group = None

    @contextlib.contextmanager
    def _operation(self, name: str, x: Tensor) -> Iterator[None]:
        with self._traffic.operation(self._kind, name, x):
            try:
                yield
            except RuntimeError as error:
                if _TIMED_OUT not in str(error):
                    raise
                operation = f"{name} of group {self._kind}"
                raise CollectiveTimeout(operation, self._timeout, self._members) from error

    def _exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        import torch

        distributed: Any = importlib.import_module("torch.distributed")
        result = torch.empty(sum(received), *x.shape[1:], dtype=x.dtype)
        options = distributed.AllToAllOptions()
        self._group.alltoall_base(result, x.contiguous(), list(received), list(sent), options).wait()
        return result


@dataclass(frozen=True)
class Joined:
    """What a rank has once all have met.

    Attributes:
        ranks: its place and the groups that it computes in.
        control: all ranks, for commands; on the host whatever the device is.
        traffic: what was given to the groups' operations.
        groups: those in ``ranks`` where tensors lie on the host.
        devices: what made them where they do not.
    """

    ranks: Ranks
    control: GlooGroup
    traffic: Traffic
    groups: tuple[GlooGroup, ...] = ()
    devices: DeviceGroups | None = None

    def abort(self) -> None:
        """End what is under way in any group of the host with an error, from any thread."""
        for group in (self.control, *self.groups):
            group.abort()

    def drop(self) -> None:
        """Leave the groups after their operations have failed."""
        for group in (self.control, *self.groups):
            group.drop()
        if self.devices is not None:
            with contextlib.suppress(Exception):  # its operations are under way for ever
                self.devices.close()

    def close(self) -> None:
        """Leave the groups, when all ranks do."""
        for group in (self.control, *self.groups):
            group.close()
        if self.devices is not None:
            self.devices.close()


@dataclass(frozen=True)
class Host:
    """Where a rank runs.

    Attributes:
        local_rank: its number among the ranks of the host, and of its device.
        local_size: the ranks of the host.
        address: of the host, as the other ranks reach it; the host name's where None.
    """

    local_rank: int
    local_size: int
    address: str | None = None


def join(store: Any, place: Place, host: Host, timeout: timedelta, device: str = "cpu") -> Joined:
    """Meet the other ranks; every rank calls it.

    Args:
        store: shared by all ranks.
        timeout: of one operation.
        device: where tensors lie: ``cpu`` (gloo), ``npu`` (hccl) or ``cuda`` (nccl).
    """
    traffic, size = Traffic(), place.split.world_size
    groups: list[GlooGroup] = []
    devices = None if device == "cpu" else DeviceGroups(device, host.local_rank, store, place, timeout, traffic)

    def group(kind: str, members: Sequence[int]) -> Communicator:
        if len(members) == 1:
            return SINGLE
        if devices is not None:
            return devices.group(kind, members)
        groups.append(GlooGroup(store, kind, members, place.rank, timeout, traffic, host.address))
        return groups[-1]

    control = GlooGroup(store, "control", range(size), place.rank, _IDLE, address=host.address)
    ranks = Ranks(
        place,
        tp=group("tp", place.tp_group),
        dp=group("dp", place.dp_group),
        ep=group("ep", place.ep_group),
        world=group("world", range(size)),
        minimum=control.minimum,
        local_rank=host.local_rank,
        local_size=host.local_size,
    )
    return Joined(ranks, control, traffic, tuple(groups), devices)


def lead_store(port: int, size: int, timeout: timedelta) -> Any:
    """The store of ranks of this host alone, held by the first of them.

    Args:
        port: where it listens, on the loopback interface; 0 takes one that is free.

    Raises:
        OSError: the port is taken.
    """
    distributed: Any = importlib.import_module("torch.distributed")
    listener = socket.create_server((LOOPBACK, port), backlog=size)
    port = listener.getsockname()[1]
    return distributed.TCPStore(
        LOOPBACK, port, size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def open_store(port: int, size: int, timeout: timedelta) -> Any:
    """What :func:`lead_store` of another rank of this host has made."""
    distributed: Any = importlib.import_module("torch.distributed")
    return distributed.TCPStore(LOOPBACK, port, size, False, timeout, wait_for_workers=False)


def prefixed(store: Any, prefix: str) -> Any:
    """A part of a store whose keys are apart from all others."""
    distributed: Any = importlib.import_module("torch.distributed")
    return distributed.PrefixStore(prefix, store)
