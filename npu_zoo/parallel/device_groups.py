"""Groups of ranks whose tensors lie on NPUs (hccl) or GPUs (nccl)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from npu_zoo.core.errors import EngineError
from npu_zoo.core.parallel import Communicator, Place, Split
from npu_zoo.parallel.sends import Sends
from npu_zoo.parallel.traffic import Traffic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BACKENDS = {"npu": "hccl", "cuda": "nccl"}
"""torch.distributed's backend by device."""


class DeviceGroup(Communicator):
    """Some ranks of a run.

    Args:
        group: torch.distributed's.
        kind: of the group, for counts.
        members: its ranks.
        rank: this one's number among them.
    """

    def __init__(self, group: Any, kind: str, members: Sequence[int], rank: int, traffic: Traffic) -> None:
        self.rank, self.size = rank, len(members)
        self._group, self._kind, self._members, self._traffic = group, kind, tuple(members), traffic
        self._distributed: Any = importlib.import_module("torch.distributed")
        self._sends = Sends()

    def all_reduce(self, x: Tensor) -> Tensor:
        """See :meth:`Communicator.all_reduce`."""
        x = x.contiguous()
        with self._traffic.operation(self._kind, "all_reduce", x):
            self._distributed.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """See :meth:`Communicator.all_gather`."""
        gathered = x.new_empty(self.size, *x.shape)
        with self._traffic.operation(self._kind, "all_gather", x):
            self._named("all_gather_single", "all_gather_into_tensor")(
                gathered.flatten(0, 1), x.contiguous(), group=self._group
            )
        return gathered.movedim(0, dim % x.dim()).flatten(dim % x.dim(), dim % x.dim() + 1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See :meth:`Communicator.reduce_scatter`."""
        part = x.new_empty(len(x) // self.size, *x.shape[1:])
        with self._traffic.operation(self._kind, "reduce_scatter", x):
            self._named("reduce_scatter_single", "reduce_scatter_tensor")(part, x.contiguous(), group=self._group)
        return part

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See :meth:`Communicator.all_to_all`."""
        result = x.new_empty(sum(received), *x.shape[1:])
        with self._traffic.operation(self._kind, "all_to_all", x):
            self._distributed.all_to_all_single(result, x.contiguous(), list(received), list(sent), group=self._group)
        return result

    def send(self, x: Tensor, to: int) -> None:
        """See :meth:`Communicator.send`."""
        x = x.contiguous()
        with self._traffic.operation(self._kind, "send", x):
            self._sends.add(self._distributed.isend(x, self._members[to], group=self._group), x)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        """See :meth:`Communicator.receive`."""
        import torch

        x = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        with self._traffic.operation(self._kind, "receive", x):
            self._distributed.recv(x, self._members[source], group=self._group)
        return x

    def _named(self, name: str, before: str) -> Any:
        """An operation by its name since torch 2.13, or the one that it had before."""
        return getattr(self._distributed, name, None) or getattr(self._distributed, before)

    @property
    def _device(self) -> torch.device:
        import torch

        kind = next(kind for kind, backend in BACKENDS.items() if backend == self._distributed.get_backend())
        return torch.device(kind, torch.get_device_module(kind).current_device())


class DeviceGroups:
    """All groups of one rank. A process has one set of them at a time, as torch.distributed has one world.

    Args:
        device: ``npu`` or ``cuda``.
        number: of this rank's device among those that it sees.
        store: shared by all ranks.
        timeout: of one operation.

    Raises:
        EngineError: the process belongs to another run already.
    """

    def __init__(
        self, device: str, number: int, store: Any, place: Place, timeout: timedelta, traffic: Traffic
    ) -> None:
        self._distributed: Any = importlib.import_module("torch.distributed")
        if self._distributed.is_initialized():
            raise EngineError(
                "torch.distributed is initialised in this process already, and a run on several devices needs it for "
                "itself; shut the other engine down, or call torch.distributed.destroy_process_group()"
            )
        _use_device(device, number)
        self._place, self._traffic = place, traffic
        self._distributed.init_process_group(
            BACKENDS[device],
            store=self._distributed.PrefixStore("devices", store),
            rank=place.rank,
            world_size=place.split.world_size,
            timeout=timeout,
        )
        everybody = self._distributed.group.WORLD
        size = place.split.world_size
        # Every rank takes part in making every group, in one order, whether it is a member or not.
        self._groups = {
            members: everybody if len(members) == size else self._distributed.new_group(list(members), timeout=timeout)
            for members in _all_groups(place.split)
        }

    def group(self, kind: str, members: Sequence[int]) -> Communicator:
        """The group of some ranks, of which this is one."""
        members = tuple(members)
        rank = members.index(self._place.rank)
        return DeviceGroup(self._groups[members], kind, members, rank, self._traffic)

    def close(self) -> None:
        """Leave all groups; the process may join another run then."""
        if self._distributed.is_initialized():
            self._distributed.destroy_process_group()


def _use_device(device: str, number: int) -> None:
    import torch

    if device == "npu":
        importlib.import_module("torch_npu")
    torch.get_device_module(device).set_device(number)


def _all_groups(split: Split) -> list[tuple[int, ...]]:
    places = [split.place(rank) for rank in range(split.world_size)]
    found = {group for place in places for group in (place.tp_group, place.dp_group, place.ep_group)}
    return sorted({group for group in found if len(group) > 1} | {tuple(range(split.world_size))})
