"""The hccl backend of torch.distributed over gloo: the same results by the simplest algorithms.

Every collective gathers bytes with gloo and computes from them in rank order, so results do not depend on timing, and
sums in half precision are rounded once. How HCCL itself behaves (its algorithms, speed, time-outs) is not simulated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from npu_zoo.simulator.errors import OperatorError, SimulatorError
from npu_zoo.simulator.overrides import Overrides

Tensors = Sequence[torch.Tensor]

DTYPES = frozenset(
    {
        *(torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    }
)
"""What HCCL carries. Source: [PTA] torch_npu/csrc/distributed/ProcessGroupHCCL.cpp, kScalarTypeToHcclDataType."""

REDUCTIONS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: lambda parts: parts.sum(0),
    dist.ReduceOp.MAX: lambda parts: parts.amax(0),
    dist.ReduceOp.MIN: lambda parts: parts.amin(0),
    dist.ReduceOp.PRODUCT: lambda parts: parts.prod(0),
    dist.ReduceOp.AVG: lambda parts: parts.mean(0),
}

_c10d: Any = torch._C._distributed_c10d
_ProcessGroup: Any = dist.ProcessGroup  # its typed overloads are more than a backend is called with
_GROUPS: dict[str, HcclGroup] = {}


def group_of(name: str) -> HcclGroup:
    """The group with a communicator's name, which operators take as ``hcom`` or ``group_ep``.

    Raises:
        OperatorError: there is none.
    """
    if name not in _GROUPS:
        raise OperatorError(f"no hccl communicator is named '{name}'; get_hccl_comm_name gives the name of a group")
    return _GROUPS[name]


class HcclGroup(_ProcessGroup):  # type: ignore[misc]
    """A process group whose tensors lie on the simulated device.

    Args:
        overrides: where launches are counted and captured steps are taped.
        store, rank, size, timeout: as torch.distributed gives them to a backend.
    """

    def __init__(self, overrides: Overrides, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._sim = overrides
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._rank, self._size = rank, size
        self._comm_name = f"simulated_hccl_{len(_GROUPS)}"
        _GROUPS[self._comm_name] = self

    def getBackendName(self) -> str:  # noqa: N802
        """``hccl``."""
        return "hccl"

    def getGroupName(self) -> str:  # noqa: N802
        """The name that torch.distributed keeps for this group."""
        return str(dist.distributed_c10d._world.pg_names.get(self, ""))

    @property
    def group_name(self) -> str:
        """:meth:`getGroupName`, as functional collectives ask for it."""
        return self.getGroupName()

    def _get_backend(self, device: torch.device) -> HcclGroup:
        return self

    def get_hccl_comm_name(self, rank: int, init_comm: bool = True) -> str:
        """The name of this group's communicator."""
        return self._comm_name

    def gather_all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A CPU tensor of every rank, in their order; all of one shape."""
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(self._size)]
        if flat.numel():
            self._gloo.allgather([parts], [flat]).wait()
        return [part.view(tensor.dtype).view(tensor.shape) for part in parts]

    def reduce_all(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        """The reduction of a CPU tensor over all ranks, halves summed in float32 and rounded once."""
        reduction = REDUCTIONS.get(getattr(operation, "op", operation))
        if reduction is None:
            raise SimulatorError(f"hccl: the reduction {operation} is not supported; sum, max, min, prod and avg are")
        parts = torch.stack(self.gather_all(tensor))
        wide = parts.float() if tensor.dtype.is_floating_point else parts.to(torch.int64)
        return reduction(wide).to(tensor.dtype)

    def exchange(self, tensor: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Rows of a CPU tensor [sum(sent), …] to every rank, and what comes back [sum(received), …]."""
        width = tensor[:1].numel() * tensor.itemsize if len(tensor) else tensor.shape[1:].numel() * tensor.itemsize
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        result = torch.empty(sum(received) * width, dtype=torch.uint8)
        sizes = [[count * width for count in rows] for rows in (received, sent)]
        self._gloo.alltoall_base(result, flat, *sizes, _c10d.AllToAllOptions()).wait()
        return result.view(tensor.dtype).view(-1, *tensor.shape[1:])

    def _launch(self, name: str, tensors: Tensors, work: Callable[..., None]) -> Any:
        for tensor in tensors:
            _check(name, tensor)
        self._sim.runtime.record(f"hccl:{name}")
        self._sim.graphs.run(functools.partial(work, *(self._sim.memory.view(tensor) for tensor in tensors)))
        return _done(list(tensors))

    def _refuse_capture(self, name: str) -> None:
        self._sim.graphs.refuse(f"hccl:{name}", "the host takes part in it")

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Any:
        """Each rank gets the reduction."""
        operation = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        return self._launch("allreduce", tensors, lambda x: x.copy_(self.reduce_all(x, operation)))

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Any:
        """:meth:`allreduce` of several tensors."""
        for tensor in tensors:
            self.allreduce([tensor], opts)
        return _done(list(tensors))

    def reduce(self, tensors: Tensors, opts: Any) -> Any:
        """The root gets the reduction."""

        def work(x: torch.Tensor) -> None:
            result = self.reduce_all(x, opts.reduceOp)
            if self._rank == opts.rootRank:
                x.copy_(result)

        return self._launch("reduce", tensors, work)

    def broadcast(self, tensors: Tensors, opts: Any) -> Any:
        """Each rank gets the root's tensor."""
        return self._launch("broadcast", tensors, lambda x: x.copy_(self.gather_all(x)[opts.rootRank]))

    def allgather(self, output_tensors: Sequence[Tensors], input_tensors: Tensors, opts: Any = None) -> Any:
        """Each rank gets a list of all."""

        def work(x: torch.Tensor, *outputs: torch.Tensor) -> None:
            for output, part in zip(outputs, self.gather_all(x), strict=True):
                output.copy_(part.view_as(output))

        self._launch("allgather", [input_tensors[0], *output_tensors[0]], work)
        return _done([list(output_tensors[0])])

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        """Each rank gets all, behind each other."""
        work = lambda out, x: out.copy_(torch.cat([p.view(-1) for p in self.gather_all(x)]).view_as(out))  # noqa: E731
        return self._launch("allgather", [output, input], work)

    all_gather_single = _allgather_base

    def allgather_into_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        """:meth:`_allgather_base` of several tensors."""
        for output, source in zip(outputs, inputs, strict=True):
            self._allgather_base(output, source, opts)
        return _done(list(outputs))

    def _reduce_scatter_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        """Each rank gets its part of the reduction."""
        operation = getattr(opts, "reduceOp", dist.ReduceOp.SUM)

        def work(out: torch.Tensor, x: torch.Tensor) -> None:
            out.copy_(self.reduce_all(x, operation).view(self._size, -1)[self._rank].view_as(out))

        return self._launch("reducescatter", [output, input], work)

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        """:meth:`_reduce_scatter_base` of several tensors."""
        for output, source in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, source, opts)
        return _done(list(outputs))

    def reduce_scatter(self, output_tensors: Tensors, input_tensors: Sequence[Tensors], opts: Any = None) -> Any:
        """Each rank gets the reduction of the tensors that are meant for it."""
        operation = getattr(opts, "reduceOp", dist.ReduceOp.SUM)

        def work(out: torch.Tensor, *parts: torch.Tensor) -> None:
            reduced = [self.reduce_all(part, operation) for part in parts]
            out.copy_(reduced[self._rank])

        return self._launch("reducescatter", [output_tensors[0], *input_tensors[0]], work)

    def alltoall_base(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
    ) -> Any:
        """Rows to every rank; equal shares where no sizes are given."""
        received = list(output_split_sizes) or [output.shape[0] // self._size] * self._size
        sent = list(input_split_sizes) or [input.shape[0] // self._size] * self._size

        def work(out: torch.Tensor, x: torch.Tensor) -> None:
            out.copy_(self.exchange(x, sent, received).view_as(out))

        return self._launch("alltoall", [output, input], work)

    all_to_all_single = alltoall_base

    def alltoall(self, output_tensors: Tensors, input_tensors: Tensors, opts: Any = None) -> Any:
        """A tensor to every rank, of any shape."""
        count = len(input_tensors)

        def work(*tensors: torch.Tensor) -> None:
            inputs, outputs = tensors[:count], tensors[count:]
            flat = torch.cat([x.reshape(-1) for x in inputs])
            found = self.exchange(flat, [x.numel() for x in inputs], [x.numel() for x in outputs])
            for output, part in zip(outputs, torch.split(found, [x.numel() for x in outputs]), strict=True):
                output.copy_(part.view_as(output))

        return self._launch("alltoall", [*input_tensors, *output_tensors], work)

    def scatter(self, output_tensors: Tensors, input_tensors: Sequence[Tensors], opts: Any) -> Any:
        """Each rank gets its part of the root's list."""
        parts = list(input_tensors[0]) if input_tensors else []

        def work(out: torch.Tensor, *parts: torch.Tensor) -> None:
            mine = torch.stack(list(parts)) if parts else out.new_zeros(self._size, *out.shape)
            out.copy_(self.gather_all(mine)[opts.rootRank][self._rank])

        return self._launch("scatter", [output_tensors[0], *parts], work)

    def gather(self, output_tensors: Sequence[Tensors], input_tensors: Tensors, opts: Any) -> Any:
        """The root gets a list of all."""
        outputs = list(output_tensors[0]) if output_tensors else []

        def work(x: torch.Tensor, *outputs: torch.Tensor) -> None:
            for output, part in zip(outputs, self.gather_all(x), strict=False):
                output.copy_(part)

        return self._launch("gather", [input_tensors[0], *outputs], work)

    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> Any:
        """To one rank."""
        self._refuse_capture("send")
        return self._launch("send", tensors, lambda x: self._gloo.send([x.contiguous()], dst, tag).wait() and None)

    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> Any:
        """From one rank."""
        self._refuse_capture("receive")
        return self._launch("receive", tensors, lambda x: self._gloo.recv([x], src, tag).wait() and None)

    def barrier(self, opts: Any = None) -> Any:
        """Every rank waits for all."""
        self._refuse_capture("barrier")
        self._gloo.barrier().wait()
        return _done([])


def install_collectives(overrides: Overrides) -> None:
    """Let ``init_process_group("hccl")`` make groups that run over gloo."""

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> HcclGroup:
        return HcclGroup(overrides, store, rank, size, timeout)

    backend: Any = dist.Backend
    backend._plugins["HCCL"] = backend._BackendPlugin(create, False)


def _check(name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type != "npu":
        raise SimulatorError(f"hccl:{name}: tensors must be on the NPU, found one on {tensor.device}")
    if not tensor.is_contiguous():
        raise SimulatorError(f"hccl:{name}: tensors must be contiguous, found strides {tensor.stride()}")
    if tensor.dtype not in DTYPES:
        raise SimulatorError(f"hccl:{name}: the dtype {tensor.dtype} is not one that HCCL carries")


def _done(result: Any) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(result)
    return _c10d._create_work_from_future(future)
