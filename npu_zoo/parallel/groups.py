"""Groups of ranks over torch.distributed. torch is imported when a group is joined."""

from __future__ import annotations

import importlib
import pickle
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from npu_zoo.core.parallel import Communicator

if TYPE_CHECKING:
    from torch import Tensor

_IDLE = timedelta(days=365)
"""How long a rank waits for its next command: a server may have nothing to do."""


class GlooGroup(Communicator):
    """Ranks of a CPU, or what ranks of any device tell each other beside their tensors.

    Args:
        store: where ranks find each other.
        name: of the group, of which a store holds several.
        timeout: of one operation.
    """

    def __init__(self, store: Any, name: str, rank: int, size: int, timeout: timedelta) -> None:
        distributed: Any = importlib.import_module("torch.distributed")
        self.rank, self.size = rank, size
        self._group = distributed.ProcessGroupGloo(distributed.PrefixStore(name, store), rank, size, timeout)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See :meth:`Communicator.all_reduce`."""
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """See :meth:`Communicator.all_gather`."""
        import torch

        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        self._group.allgather([parts], [x.contiguous()]).wait()
        return torch.cat(parts, dim)

    def minimum(self, value: int) -> int:
        """See :meth:`Communicator.minimum`."""
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

    def abort(self) -> None:
        """End what is under way with an error, from any thread."""
        self._group.abort()


class Ranks:
    """One rank's groups.

    Attributes:
        tp: the ranks that share every layer.
        control: the same ranks, for commands.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        self.control = GlooGroup(store, "control", rank, size, _IDLE)
        self.tp: Communicator = GlooGroup(store, "tp", rank, size, timeout)


def open_store(port: int, size: int, *, leads: bool, timeout: timedelta, address: str = "127.0.0.1") -> Any:
    """The store of a run, which the leading rank holds; port 0 lets it choose one that is free."""
    distributed: Any = importlib.import_module("torch.distributed")
    return distributed.TCPStore(address, port, size, leads, timeout, wait_for_workers=False)
