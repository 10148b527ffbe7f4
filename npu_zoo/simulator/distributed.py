"""The hccl backend of torch.distributed over gloo: the same results by the simplest algorithms.

Every collective gathers bytes with gloo and computes from them in rank order, so results do not depend on timing, and
sums in half precision are rounded once. How HCCL itself behaves (its algorithms, speed, time-outs) is not simulated.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from npu_zoo.simulator.errors import OperatorError
from npu_zoo.simulator.overrides import Overrides

Tensors = Sequence[torch.Tensor]
Method = TypeVar("Method", bound=Callable[..., Any])

MOVED = frozenset({
    torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
})  # fmt: skip
"""What HCCL carries. Source: Ascend/pytorch, HCCLUtils.cpp, kScalarTypeToHcclDataType."""

REDUCED = {
    "ascend910b": frozenset({
        torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16,
    }),
    "ascend310p": frozenset({torch.int8, torch.int16, torch.int32, torch.float16, torch.float32}),
}  # fmt: skip
"""What HCCL reduces. Source: CANN 8.5, HCCL API, HcclAllReduce, dataType."""

WIDENED = frozenset({torch.bool, torch.uint8})
"""What torch_npu casts to int32 around a reduction. Source: Ascend/pytorch, ProcessGroupHCCL::allreduce and reduce."""

UNREDUCED: dict[str, dict[Any, tuple[torch.dtype, ...]]] = {
    "ascend910b": {dist.ReduceOp.PRODUCT: (torch.int16, torch.bfloat16)},
    "ascend310p": dict.fromkeys((dist.ReduceOp.PRODUCT, dist.ReduceOp.MAX, dist.ReduceOp.MIN), (torch.int16,)),
}
"""Of :data:`REDUCED`, what some reductions leave out. Source: CANN 8.0, HCCL API, allreduce, the note on reduction."""

REDUCTIONS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: lambda parts: parts.sum(0),
    dist.ReduceOp.MAX: lambda parts: parts.amax(0),
    dist.ReduceOp.MIN: lambda parts: parts.amin(0),
    dist.ReduceOp.PRODUCT: lambda parts: parts.prod(0),
}

_c10d: Any = torch._C._distributed_c10d
_ProcessGroup: Any = dist.ProcessGroup  # its typed overloads are more than a backend is called with
_Work: Any = dist.Work
_GROUPS: dict[str, HcclGroup] = {}
_NUMBERS = itertools.count()


def group_of(name: str) -> HcclGroup:
    """The group with a communicator's name, which operators take as ``hcom`` or ``group_ep``.

    Raises:
        OperatorError: there is none.
    """
    if name not in _GROUPS:
        raise OperatorError(f"no hccl communicator is named '{name}'; get_hccl_comm_name gives the name of a group")
    return _GROUPS[name]


class Transfers(_Work):  # type: ignore[misc]
    """Messages under way. Their tensors stay allocated until they have been waited for.

    Args:
        works: what gloo gave for each message.
        tensors: those on the device that are sent from or received into.
    """

    def __init__(self, works: Sequence[Any], tensors: Tensors = ()) -> None:
        super().__init__()
        self._works, self._tensors = list(works), list(tensors)

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        """Block until all have arrived."""
        while self._works:
            self._works.pop(0).wait()
        self._tensors.clear()
        return True

    def is_completed(self) -> bool:
        """Whether they have been waited for."""
        return not self._works


def _on_either(method: Method) -> Method:
    """Let gloo answer calls with tensors of the host where the group was made for both (``cpu:gloo,npu:hccl``)."""

    @functools.wraps(method)
    def run(self: HcclGroup, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if self.serves_host and all(tensor.device.type == "cpu" for tensor in _flat(tensors)):
            return getattr(self.gloo, method.__name__)(tensors, *args, **kwargs)
        return method(self, tensors, *args, **kwargs)

    return run  # type: ignore[return-value]


class HcclGroup(_ProcessGroup):  # type: ignore[misc]
    """A process group whose tensors lie on the simulated device.

    Args:
        overrides: where launches are counted and captured steps are taped.
        store, rank, size, timeout: as torch.distributed gives them to a backend.

    Attributes:
        gloo: what carries the bytes.
        supports_splitting: False; a new group has its own connections.
    """

    supports_splitting = False

    def __init__(self, overrides: Overrides, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._sim = overrides
        self.gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._rank, self._size = rank, size
        self._together: list[Any] | None = None  # messages since _start_coalescing
        self._comm_name = f"simulated_hccl_{next(_NUMBERS)}"
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

    @property
    def serves_host(self) -> bool:
        """Whether gloo was asked for beside hccl, for tensors of the host."""
        return "cpu:gloo" in dist.distributed_c10d._world.pg_backend_config.get(self, "")

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("npu"), *([torch.device("cpu")] if self.serves_host else [])]

    def _get_backend(self, device: torch.device) -> Any:
        return self.gloo if self.serves_host and torch.device(device).type == "cpu" else self

    def get_hccl_comm_name(self, rank: int, init_comm: bool = True) -> str:
        """The name of this group's communicator."""
        return self._comm_name

    def shutdown(self) -> None:
        """Forget the communicator."""
        _GROUPS.pop(self._comm_name, None)

    abort = shutdown

    def gather_all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A CPU tensor of every rank, in their order; all of one shape."""
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(self._size)]
        if flat.numel():
            self.gloo.allgather([parts], [flat]).wait()
        return [part.view(tensor.dtype).view(tensor.shape) for part in parts]

    def gather_uneven(self, tensor: torch.Tensor, counts: Sequence[int]) -> Tensors:
        """The elements of a CPU tensor of every rank, of which rank ``i`` has ``counts[i]``."""
        flat = tensor.reshape(-1)
        found = self.exchange(flat.repeat(self._size), [flat.numel()] * self._size, counts)
        return torch.split(found, list(counts))

    def reduce_all(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        """The reduction of a CPU tensor over all ranks, halves summed in float32 and rounded once."""
        kind = getattr(operation, "op", operation)
        average = kind == dist.ReduceOp.AVG
        parts = torch.stack(self.gather_all(tensor))
        wide = parts.float() if tensor.dtype.is_floating_point else parts.to(torch.int64)
        reduced = REDUCTIONS[dist.ReduceOp.SUM if average else kind](wide).to(tensor.dtype)
        return reduced / self._size if average else reduced  # torch_npu divides what HCCL has summed

    def exchange(self, tensor: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Rows of a CPU tensor [sum(sent), …] to every rank, and what comes back [sum(received), …]."""
        width = tensor.shape[1:].numel() * tensor.itemsize
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        result = torch.empty(sum(received) * width, dtype=torch.uint8)
        sizes = [[count * width for count in rows] for rows in (received, sent)]
        self.gloo.alltoall_base(result, flat, *sizes, _c10d.AllToAllOptions()).wait()
        return result.view(tensor.dtype).view(sum(received), *tensor.shape[1:])

    def _launch(self, name: str, tensors: Tensors, work: Callable[..., Any]) -> Any:
        self._check(name, tensors)
        self._sim.runtime.record(f"hccl:{name}")
        self._sim.graphs.run(functools.partial(work, *(self._sim.memory.view(tensor) for tensor in tensors)))
        return _done(list(tensors))

    def _check(self, name: str, tensors: Tensors) -> None:
        for tensor in tensors:
            if tensor.device.type != "npu":
                raise OperatorError(f"hccl:{name}: tensors must be on the NPU, found one on {tensor.device}")
            if not tensor.is_contiguous():
                raise OperatorError(f"hccl:{name}: tensors must be contiguous, found strides {tensor.stride()}")
            if tensor.dtype not in MOVED:
                raise OperatorError(f"hccl:{name}: HCCL does not carry {tensor.dtype}")
        for what, found in (("dtype", {t.dtype for t in tensors}), ("device", {t.device for t in tensors})):
            if len(found) > 1:
                names = ", ".join(sorted(str(one) for one in found))
                raise OperatorError(f"hccl:{name}: tensors must be of one {what}, found {names}")

    def _check_reduction(self, name: str, tensor: torch.Tensor, operation: Any, *, widens: bool = False) -> None:
        kind, dtype, chip = getattr(operation, "op", operation), tensor.dtype, self._sim.runtime.machine.chip
        if kind not in REDUCTIONS and kind != dist.ReduceOp.AVG:
            raise OperatorError(f"hccl:{name}: HCCL reduces by sum, max, min, product and average, not {kind}")
        if kind == dist.ReduceOp.AVG and not dtype.is_floating_point:
            raise OperatorError(f"hccl:{name}: an average of {dtype} cannot be divided in place; sum and divide")
        if widens and dtype in WIDENED:
            return
        if dtype not in REDUCED[chip] or dtype in UNREDUCED[chip].get(kind, ()):
            raise OperatorError(f"hccl:{name}: HCCL on {chip} does not reduce {dtype} by {kind}")

    def _refuse_capture(self, name: str) -> None:
        self._sim.graphs.refuse(f"hccl:{name}", "the host takes part in it")

    @_on_either
    def allreduce(self, tensors: Tensors, opts: Any = None) -> Any:
        """Each rank gets the reduction."""
        operation = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        self._check_reduction("allreduce", tensors[0], operation, widens=True)
        return self._launch("allreduce", tensors, lambda x: x.copy_(self.reduce_all(x, operation)))

    @_on_either
    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Any:
        """:meth:`allreduce` of several tensors."""
        for tensor in tensors:
            self.allreduce([tensor], opts)
        return _done(list(tensors))

    @_on_either
    def reduce(self, tensors: Tensors, opts: Any) -> Any:
        """The root gets the reduction."""
        operation, root = opts.reduceOp, opts.rootRank
        self._check_reduction("reduce", tensors[0], operation, widens=True)

        def work(x: torch.Tensor) -> None:
            result = self.reduce_all(x, operation)
            if self._rank == root:
                x.copy_(result)

        return self._launch("reduce", tensors, work)

    @_on_either
    def broadcast(self, tensors: Tensors, opts: Any) -> Any:
        """Each rank gets the root's tensor."""
        root = opts.rootRank
        return self._launch("broadcast", tensors, lambda x: x.copy_(self.gather_all(x)[root]))

    @_on_either
    def allgather(self, output_tensors: Sequence[Tensors], input_tensors: Tensors, opts: Any = None) -> Any:
        """Each rank gets a list of all, which may differ in size."""
        counts = [output.numel() for output in output_tensors[0]]
        _expect("allgather", "outputs", len(counts), self._size)
        _expect("allgather", "elements in this rank's output", counts[self._rank], input_tensors[0].numel())

        def work(x: torch.Tensor, *outputs: torch.Tensor) -> None:
            parts = self.gather_all(x) if len(set(counts)) == 1 else self.gather_uneven(x, counts)
            for output, part in zip(outputs, parts, strict=True):
                output.copy_(part.view_as(output))

        self._launch("allgather", [input_tensors[0], *output_tensors[0]], work)
        return _done([list(output_tensors[0])])

    @_on_either
    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        """Each rank gets all, behind each other."""
        _expect("allgather", "elements in the output", output.numel(), self._size * input.numel())
        work = lambda out, x: out.view(-1).copy_(torch.cat([p.view(-1) for p in self.gather_all(x)]))  # noqa: E731
        return self._launch("allgather", [output, input], work)

    all_gather_single = _allgather_base

    def all_gather_into_tensor_uneven(self, output: torch.Tensor, input: torch.Tensor, sizes: Sequence[int]) -> Any:
        """:meth:`_allgather_base` where ranks have different numbers of rows."""
        width = output.shape[1:].numel()
        counts = [rows * width for rows in _rows("allgather", sizes, output, self._size)]
        _expect("allgather", "elements in the input", input.numel(), counts[self._rank])
        work = lambda out, x: out.view(-1).copy_(torch.cat(list(self.gather_uneven(x, counts))))  # noqa: E731
        return self._launch("allgather", [output, input], work)

    @_on_either
    def allgather_into_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        """:meth:`_allgather_base` of several tensors."""
        for output, source in zip(outputs, inputs, strict=True):
            self._allgather_base(output, source, opts)
        return _done(list(outputs))

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    @_on_either
    def _reduce_scatter_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        """Each rank gets its part of the reduction."""
        operation = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        self._check_reduction("reducescatter", input, operation)
        _expect("reducescatter", "elements in the input", input.numel(), self._size * output.numel())

        def work(out: torch.Tensor, x: torch.Tensor) -> None:
            out.copy_(self.reduce_all(x, operation).view(self._size, -1)[self._rank].view_as(out))

        return self._launch("reducescatter", [output, input], work)

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_uneven(
        self, output: torch.Tensor, input: torch.Tensor, sizes: Sequence[int], opts: Any
    ) -> Any:
        """:meth:`_reduce_scatter_base` where ranks get different numbers of rows."""
        operation = opts.reduceOp
        self._check_reduction("reducescatter", input, operation)
        rows = _rows("reducescatter", sizes, input, self._size)
        _expect("reducescatter", "rows in the output", len(output), rows[self._rank])
        work = lambda out, x: out.copy_(torch.split(self.reduce_all(x, operation), rows)[self._rank])  # noqa: E731
        return self._launch("reducescatter", [output, input], work)

    @_on_either
    def reduce_scatter_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        """:meth:`_reduce_scatter_base` of several tensors."""
        for output, source in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, source, opts)
        return _done(list(outputs))

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    @_on_either
    def reduce_scatter(self, output_tensors: Tensors, input_tensors: Sequence[Tensors], opts: Any = None) -> Any:
        """Each rank gets the reduction of the tensors that are meant for it."""
        operation = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        self._check_reduction("reducescatter", output_tensors[0], operation)
        _expect("reducescatter", "inputs", len(input_tensors[0]), self._size)

        def work(out: torch.Tensor, *parts: torch.Tensor) -> None:
            reduced = [self.reduce_all(part, operation) for part in parts]
            out.copy_(reduced[self._rank])

        return self._launch("reducescatter", [output_tensors[0], *input_tensors[0]], work)

    @_on_either
    def alltoall_base(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
    ) -> Any:
        """Rows to every rank; equal shares where no sizes are given."""
        received = _rows("alltoall", output_split_sizes, output, self._size)
        sent = _rows("alltoall", input_split_sizes, input, self._size)
        work = lambda out, x: out.copy_(self.exchange(x, sent, received).view_as(out))  # noqa: E731
        return self._launch("alltoall", [output, input], work)

    all_to_all_single = alltoall_base

    @_on_either
    def alltoall(self, output_tensors: Tensors, input_tensors: Tensors, opts: Any = None) -> Any:
        """A tensor to every rank, of any shape."""
        for what, tensors in (("inputs", input_tensors), ("outputs", output_tensors)):
            _expect("alltoall", what, len(tensors), self._size)
        sent, received = [x.numel() for x in input_tensors], [x.numel() for x in output_tensors]

        def work(*tensors: torch.Tensor) -> None:
            inputs, outputs = tensors[: self._size], tensors[self._size :]
            found = self.exchange(torch.cat([x.view(-1) for x in inputs]), sent, received)
            for output, part in zip(outputs, torch.split(found, received), strict=True):
                output.copy_(part.view_as(output))

        return self._launch("alltoall", [*input_tensors, *output_tensors], work)

    def alltoallvc(self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int]) -> Any:
        """Elements to every rank, by a matrix of what each rank sends to each, row behind row."""
        sent, received = list(counts[self._rank * self._size :][: self._size]), list(counts[self._rank :: self._size])
        _expect("alltoall", "elements in the input", input.numel(), sum(sent))
        _expect("alltoall", "elements in the output", output.numel(), sum(received))
        work = lambda out, x: out.view(-1).copy_(self.exchange(x.view(-1), sent, received))  # noqa: E731
        return self._launch("alltoall", [output, input], work)

    @_on_either
    def scatter(self, output_tensors: Tensors, input_tensors: Sequence[Tensors], opts: Any) -> Any:
        """Each rank gets its part of the root's list."""
        parts, root = list(input_tensors[0]) if input_tensors else [], opts.rootRank

        def work(out: torch.Tensor, *parts: torch.Tensor) -> None:
            mine = torch.stack(list(parts)) if parts else out.new_zeros(self._size, *out.shape)
            out.copy_(self.gather_all(mine)[root][self._rank])

        return self._launch("scatter", [output_tensors[0], *parts], work)

    @_on_either
    def gather(self, output_tensors: Sequence[Tensors], input_tensors: Tensors, opts: Any) -> Any:
        """The root gets a list of all."""
        outputs = list(output_tensors[0]) if output_tensors else []
        _expect("gather", "outputs", len(outputs), self._size if self._rank == opts.rootRank else 0)

        def work(x: torch.Tensor, *outputs: torch.Tensor) -> None:
            for output, part in zip(outputs, self.gather_all(x), strict=bool(outputs)):
                output.copy_(part)

        return self._launch("gather", [input_tensors[0], *outputs], work)

    @_on_either
    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> Any:
        """To one rank."""
        return self._transfer("send", self.gloo.send, tensors, dst, tag)

    @_on_either
    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> Any:
        """From one rank."""
        return self._transfer("receive", self.gloo.recv, tensors, src, tag)

    @_on_either
    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Any:
        """HCCL has no such thing."""
        raise OperatorError("hccl:receive: HCCL cannot receive from any rank; name the source")

    def batch_isend_irecv(self, kinds: Sequence[str], tensors: Tensors, peers: Sequence[int]) -> Transfers:
        """Several messages at once, each an ``isend`` or an ``irecv``."""
        calls = {"isend": self.send, "irecv": self.recv}
        return Transfers([calls[kind]([x], peer) for kind, x, peer in zip(kinds, tensors, peers, strict=True)])

    def _transfer(self, name: str, call: Callable[..., Any], tensors: Tensors, peer: int, tag: int) -> Transfers:
        self._refuse_capture(name)
        self._check(name, tensors)
        self._sim.runtime.record(f"hccl:{name}")
        work = Transfers([call([self._sim.memory.view(x) for x in tensors], peer, tag)], tensors)
        if self._together is not None:
            self._together.append(work)
        return work

    def _start_coalescing(self, device: torch.device) -> None:
        self._together = []

    def _end_coalescing(self, device: torch.device) -> Transfers:
        works, self._together = self._together or [], None
        return Transfers(works)

    def barrier(self, opts: Any = None) -> Any:
        """Every rank waits for all."""
        self._refuse_capture("barrier")
        self._sim.runtime.record("hccl:barrier")
        self.gloo.barrier().wait()
        return _done([])


def install_collectives(overrides: Overrides) -> None:
    """Let ``init_process_group("hccl")`` make groups that run over gloo."""

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> HcclGroup:
        return HcclGroup(overrides, store, rank, size, timeout)

    backend: Any = dist.Backend
    backend._plugins["HCCL"] = backend._BackendPlugin(create, False)


def _flat(tensors: Any) -> list[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [tensor for one in tensors for tensor in _flat(one)]


def _expect(name: str, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise OperatorError(f"hccl:{name}: {wanted} {what} are wanted, found {found}")


def _rows(name: str, sizes: Sequence[int], tensor: torch.Tensor, ranks: int) -> list[int]:
    """The rows of each rank in a tensor, equally many where no sizes are given."""
    if not tensor.dim():
        raise OperatorError(f"hccl:{name}: tensors must have a dimension to be divided")
    if not sizes and len(tensor) % ranks:
        raise OperatorError(f"hccl:{name}: {len(tensor)} rows cannot be divided among {ranks} ranks")
    rows = list(sizes) or [len(tensor) // ranks] * ranks
    _expect(name, "split sizes", len(rows), ranks)
    _expect(name, "rows in the sum of the split sizes", sum(rows), len(tensor))
    return rows


def _done(result: Any) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(result)
    return _c10d._create_work_from_future(future)
