"""One rank of tests/npu/test_distributed.py: checks every collective against a closed form, and exits with 0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch_npu
import torch_npu.distributed as npu_distributed
from torch.distributed.device_mesh import init_device_mesh

from npu_zoo.simulator import measure
from npu_zoo.simulator.distributed import group_of

BF16 = "310" not in torch.npu.get_device_name(0)


def ranks_of(rank: int, size: int) -> torch.Tensor:
    return torch.arange(6.0).view(2, 3) + 10 * rank


def refused(word: str, call: Callable[[], object]) -> None:
    try:
        call()
    except RuntimeError as error:
        assert word in str(error), error  # noqa: PT017
    else:
        raise AssertionError(f"no error speaks of '{word}'")


def comm_name(group: dist.ProcessGroup) -> str:
    return group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())


def reductions(rank: int, size: int) -> None:
    total = sum(ranks_of(r, size) for r in range(size))
    for dtype in (torch.float32, torch.float16, torch.int32, *([torch.bfloat16, torch.int64] if BF16 else [])):
        for operation, expected in (
            (dist.ReduceOp.SUM, total),
            (dist.ReduceOp.MAX, ranks_of(size - 1, size)),
            (dist.ReduceOp.MIN, ranks_of(0, size)),
        ):
            x = ranks_of(rank, size).to(dtype).npu()
            dist.all_reduce(x, operation)
            assert torch.equal(x.cpu(), expected.to(dtype)), (dtype, operation)
    work = dist.all_reduce(x := ranks_of(rank, size).npu(), async_op=True)
    work.wait()
    assert torch.equal(x.cpu(), total)
    part = torch.empty(3).npu()
    dist.reduce_scatter_tensor(part, torch.arange(3.0 * size).npu() * (rank + 1))
    factor = size * (size + 1) / 2
    assert part.cpu().tolist() == [(3 * rank + i) * factor for i in range(3)]
    out = torch.empty(2, 3).npu()
    dist.reduce_scatter(out, [ranks_of(r, size).npu() for r in range(size)])
    assert torch.equal(out.cpu(), ranks_of(rank, size) * size)
    x = ranks_of(rank, size).npu()
    dist.reduce(x, dst=size - 1)
    assert rank < size - 1 or torch.equal(x.cpu(), total)


def further_reductions(rank: int, size: int) -> None:
    average = torch.tensor([2.0 * rank]).npu()
    dist.all_reduce(average, dist.ReduceOp.AVG)
    assert average.item() == size - 1
    either = torch.tensor([rank == 0, False, True]).npu()
    dist.all_reduce(either)
    assert either.tolist() == [True, False, True]
    unit, small = (256.0, torch.bfloat16) if BF16 else (2048.0, torch.float16)
    x = torch.tensor([unit if rank == 0 else 1.0]).to(small).npu()
    dist.all_reduce(x)  # one rounding: adding the small terms one by one would change nothing
    assert x.item() == torch.tensor(unit + size - 1).to(small).item()
    refused("float64", lambda: dist.all_reduce(torch.ones(2, dtype=torch.float64).npu()))
    refused("average", lambda: dist.all_reduce(torch.ones(2, dtype=torch.int32).npu(), dist.ReduceOp.AVG))
    if not BF16:
        refused("int64", lambda: dist.all_reduce(torch.ones(2, dtype=torch.int64).npu()))
        refused("int16", lambda: dist.all_reduce(torch.ones(2, dtype=torch.int16).npu(), dist.ReduceOp.MAX))


def gathers(rank: int, size: int) -> None:
    every = [ranks_of(r, size) for r in range(size)]
    outputs = [torch.empty(2, 3).npu() for _ in range(size)]
    dist.all_gather(outputs, ranks_of(rank, size).npu())
    assert torch.equal(torch.stack(outputs).cpu(), torch.stack(every))
    whole = torch.empty(2 * size, 3).npu()
    dist.all_gather_into_tensor(whole, ranks_of(rank, size).npu())
    assert torch.equal(whole.cpu(), torch.cat(every))
    x = ranks_of(rank, size).npu()
    dist.broadcast(x, src=size - 1)
    assert torch.equal(x.cpu(), every[-1])
    dist.scatter(x, [part.npu() for part in every] if rank == 0 else None, src=0)
    assert torch.equal(x.cpu(), every[rank])
    listed = [torch.empty(2, 3).npu() for _ in range(size)] if rank == 0 else None
    dist.gather(x, listed, dst=0)
    assert listed is None or torch.equal(torch.stack(listed).cpu(), torch.stack(every))


def uneven(rank: int, size: int) -> None:
    counts = [r + 1 for r in range(size)]
    rows = [float(r) for r in range(size) for _ in range(r + 1)]
    mine = torch.full((rank + 1, 2), float(rank)).npu()
    outputs = [torch.empty(count, 2).npu() for count in counts]
    dist.all_gather(outputs, mine)
    assert torch.cat(outputs)[:, 1].tolist() == rows
    whole = torch.empty(len(rows), 2).npu()
    npu_distributed.all_gather_into_tensor_uneven(whole, mine, counts)
    assert whole[:, 1].tolist() == rows
    part = torch.empty(rank + 1, 2).npu()
    npu_distributed.reduce_scatter_tensor_uneven(part, whole, counts)
    assert part.tolist() == [[rank * size] * 2] * (rank + 1)
    matrix = [[i + 2 * j + 1 for j in range(size)] for i in range(size)]
    received = torch.empty(sum(row[rank] for row in matrix)).npu()
    npu_distributed.all_to_all_vc(received, torch.full((sum(matrix[rank]),), float(rank)).npu(), matrix)
    assert received.tolist() == [float(r) for r in range(size) for _ in range(matrix[r][rank])]


def objects(rank: int, size: int) -> None:
    shared = [{"from": rank}]
    dist.broadcast_object_list(shared, src=size - 1)
    assert shared == [{"from": size - 1}]
    every = [None] * size
    dist.all_gather_object(every, ("rank", rank))
    assert every == [("rank", r) for r in range(size)]


def exchanges(rank: int, size: int) -> None:
    out = torch.empty(size).npu()
    dist.all_to_all_single(out, torch.arange(float(size)).npu() + 10 * rank)
    assert out.cpu().tolist() == [10.0 * r + rank for r in range(size)]
    sent = [r + 1 for r in range(size)]
    received = [rank + 1] * size
    out = torch.empty(sum(received), 2).npu()
    dist.all_to_all_single(out, torch.full((sum(sent), 2), float(rank)).npu(), received, sent)
    assert out[:, 0].cpu().tolist() == [float(r) for r in range(size) for _ in range(rank + 1)]
    outputs = [torch.empty(rank + 1).npu() for _ in range(size)]
    dist.all_to_all(outputs, [torch.full((r + 1,), float(rank)).npu() for r in range(size)])
    assert [o.cpu().tolist() for o in outputs] == [[float(r)] * (rank + 1) for r in range(size)]
    if size > 1:
        if rank == 0:
            dist.send(torch.tensor([7.0]).npu(), dst=1)
        elif rank == 1:
            got = torch.zeros(1).npu()
            dist.recv(got, src=0)
            assert got.item() == 7.0
    dist.barrier()


def messages(rank: int, size: int) -> None:
    """Round a ring: every rank sends before any receives."""
    if size < 2:
        return
    after, before = (rank + 1) % size, (rank - 1) % size
    sent, got = torch.full((3,), float(rank)).npu(), torch.zeros(3).npu()
    works = [dist.isend(sent, after), dist.irecv(got, before)]
    for work in works:
        work.wait()
    assert got.tolist() == [float(before)] * 3
    sent += 10
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, got, before)]):
        work.wait()
    assert got.tolist() == [10.0 + before] * 3
    refused("any rank", lambda: dist.recv(got))


def functional_collectives(rank: int, size: int) -> None:
    group = dist.group.WORLD
    x = ranks_of(rank, size).npu()
    total = sum(ranks_of(r, size) for r in range(size))
    assert torch.equal(functional.all_reduce(x, "sum", group).cpu(), total)
    gathered = functional.all_gather_tensor(x, 0, group)
    assert torch.equal(gathered.cpu(), torch.cat([ranks_of(r, size) for r in range(size)]))
    scattered = functional.reduce_scatter_tensor(torch.arange(2.0 * size).npu(), "sum", 0, group)
    assert scattered.cpu().tolist() == [(2 * rank + i) * size for i in range(2)]
    exchanged = functional.all_to_all_single(torch.full((size,), float(rank)).npu(), None, None, group)
    assert exchanged.cpu().tolist() == [float(r) for r in range(size)]


def functional_operators(rank: int, size: int) -> None:
    ops, name = torch.ops._c10d_functional, dist.group.WORLD.group_name
    x, total = torch.full((2,), float(rank)).npu(), size * (size - 1) / 2
    found = ops.wait_tensor(ops.all_reduce(x, "sum", name))
    assert found.tolist() == [total] * 2
    several = [ops.wait_tensor(y) for y in ops.all_reduce_coalesced([x, x + 1], "sum", name)]
    assert [y.tolist() for y in several] == [[total] * 2, [total + size] * 2]
    several = [ops.wait_tensor(y) for y in ops.all_gather_into_tensor_coalesced([x, x + 1], size, name)]
    assert several[1].tolist() == [float(r + 1) for r in range(size) for _ in range(2)]
    whole = torch.arange(2.0 * size).npu()
    several = [ops.wait_tensor(y) for y in ops.reduce_scatter_tensor_coalesced([whole, whole + 1], "sum", size, name)]
    assert several[1].tolist() == [(2 * rank + i + 1) * size for i in range(2)]
    sent, received = [r + 1 for r in range(size)], [rank + 1] * size
    moved = ops.wait_tensor(ops.all_to_all_single(torch.full((sum(sent),), float(rank)).npu(), received, sent, name))
    assert moved.tolist() == [float(r) for r in range(size) for _ in range(rank + 1)]
    assert ops.wait_tensor(ops.broadcast(x, size - 1, name)).tolist() == [size - 1.0] * 2
    mesh = init_device_mesh("npu", (max(1, size // 2), min(2, size)), mesh_dim_names=("dp", "tp"))
    first = rank // 2 * 2
    pair = functional.all_reduce(x, "sum", mesh["tp"])
    assert pair.tolist() == [first + (first + 1 if size > 1 else 0)] * 2


def subgroups(rank: int, size: int) -> None:
    pairs = [dist.new_group([i, i + 1]) for i in range(0, size - 1, 2)]
    if pairs:
        x = torch.tensor([float(rank)]).npu()
        dist.all_reduce(x, group=pairs[rank // 2])
        assert x.item() == 4 * (rank // 2) + 1
    other = dist.new_group()
    name = comm_name(other)
    assert group_of(name) is other
    assert name != comm_name(dist.group.WORLD)
    dist.destroy_process_group(other)
    refused("no hccl communicator", lambda: group_of(name))
    both = dist.new_group(backend="cpu:gloo,npu:hccl")
    for x in (torch.ones(2), torch.ones(2).npu()):
        dist.all_reduce(x, group=both)
        assert x.tolist() == [size, size]


def _capture(call: Callable[[], object]) -> None:
    with torch.npu.graph(torch.npu.NPUGraph()):
        call()


def captured(rank: int, size: int) -> None:
    x = torch.zeros(4).npu()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = x * 2
        dist.all_reduce(y)
        z = y + 1
    for step in range(3):
        x.fill_(float(step + rank))
        graph.replay()
        assert z.cpu().tolist() == [2.0 * (size * step + size * (size - 1) / 2) + 1] * 4
    functions, group = torch.npu.NPUGraph(), dist.group.WORLD
    with torch.npu.graph(functions):
        summed = functional.all_reduce(x, "sum", group) + 1
        gathered = functional.all_gather_tensor(summed, 0, group)
        swapped = functional.all_to_all_single(torch.cat([x[:1] + 10] * size), None, None, group) * 1
    for step in range(2):
        x.fill_(float(step + rank))
        functions.replay()
        assert gathered.tolist() == [size * step + size * (size - 1) / 2 + 1] * 4 * size
        assert swapped.tolist() == [10.0 + step + r for r in range(size)]
    for call in (dist.barrier, *([lambda: dist.send(x, (rank + 1) % size)] if size > 1 else [])):
        with torch.npu.stream(torch.npu.Stream()):
            refused("captured", lambda call=call: _capture(call))
    torch.npu.set_stream(torch.npu.default_stream())


def refusals(rank: int, size: int) -> None:
    x = torch.ones(2).npu()
    refused("on the NPU", lambda: dist.all_reduce(torch.ones(2)))
    refused("contiguous", lambda: dist.all_reduce(torch.ones(4, 4).npu().t()))
    refused("one dtype", lambda: dist.all_gather_into_tensor(torch.empty(2 * size).half().npu(), x))
    refused("elements", lambda: dist.all_gather_into_tensor(torch.empty(3 * size).npu(), x))
    refused("elements", lambda: dist.reduce_scatter_tensor(torch.empty(3).npu(), torch.ones(2 * size).npu()))
    refused("split sizes", lambda: dist.all_to_all_single(x, x.clone(), [2] + [0] * (size - 1), [1] * size + [0]))
    if size > 1:
        refused("divided", lambda: dist.all_to_all_single(torch.ones(size + 1).npu(), torch.ones(size + 1).npu()))


def fused(rank: int, size: int) -> None:
    if not BF16:
        return
    name = comm_name(dist.group.WORLD)
    x = (torch.arange(8.0).view(2, 4) * (rank + 1)).half()
    weight = torch.eye(4).half()
    found = torch_npu.npu_mm_all_reduce_base(x.npu(), weight.npu(), name)
    whole = torch.arange(8.0).view(2, 4) * (size * (size + 1) / 2)
    assert torch.equal(found.cpu(), whole.half())
    added = (torch.ones(4) * 2).half().npu(), torch.ones(2, 4).half().npu()
    found = torch_npu.npu_mm_all_reduce_base(x.npu(), weight.npu(), name, bias=added[0], x3=added[1])
    assert torch.equal(found.cpu(), (whole + 3 * size).half())  # both are terms of every rank's product
    refused("no hccl communicator", lambda: torch_npu.npu_mm_all_reduce_base(x.npu(), weight.npu(), "nobody"))


def quantised(rank: int, size: int) -> None:
    """int8 products with scales; every value here is exact in float16."""
    if not BF16 or size < 2:
        return
    name, generator = comm_name(dist.group.WORLD), torch.Generator().manual_seed(5)
    x = torch.randint(-1, 2, (size, 2 * size, 256), generator=generator).to(torch.int8)
    weight = torch.randint(-1, 2, (size, 256, 16), generator=generator).to(torch.int8)
    columns, tokens = 2.0 ** (torch.arange(16) % 4 - 2), 2.0 ** (torch.arange(2 * size) % 3)
    products = [x[r].double() @ weight[r].double() for r in range(size)]
    reduced = torch_npu.npu_mm_all_reduce_base(
        x[rank].npu(), weight[rank].npu(), name, dequant_scale=columns.npu(), pertoken_scale=tokens.npu()
    )
    assert torch.equal(reduced.cpu().double(), sum(products) * columns * tokens[:, None])
    scales = {"x1_scale": tokens[:, None].npu(), "x2_scale": columns[None].npu(), "output_dtype": torch.float16}
    part = torch_npu.npu_mm_reduce_scatter_base(
        x[rank].npu(), weight[rank].npu(), name, size, comm_mode="aiv", **scales
    )
    assert torch.equal(part.cpu().double(), (sum(products) * columns * tokens[:, None])[2 * rank : 2 * rank + 2])
    own = torch.stack([tokens * 2**r for r in range(size)])  # every rank's rows have scales of their own
    scales["x1_scale"] = own[rank][:, None].npu()
    gathered, _ = torch_npu.npu_all_gather_base_mm(
        x[rank].npu(), weight[0].npu(), name, size, comm_mode="aiv", **scales
    )
    expected = x.view(-1, 256).double() @ weight[0].double() * columns * own.view(-1, 1)
    assert torch.equal(gathered.cpu().double(), expected)
    groups = 2.0 ** (torch.arange(4 * 16).view(4, 16) % 3 - 1)
    spread = groups.repeat_interleave(64, 0).double()
    found = torch_npu.npu_mm_all_reduce_base(
        x[rank].half().npu(), weight[rank].npu(), name, antiquant_scale=groups.half().npu(),
        antiquant_offset=torch.ones(4, 16).half().npu(), antiquant_group_size=64,
    )  # fmt: skip
    expected = sum(x[r].double() @ ((weight[r].double() + 1) * spread) for r in range(size))
    assert torch.equal(found.cpu().double(), expected)
    refused("world_size", lambda: torch_npu.npu_mm_reduce_scatter_base(
        torch.ones(8, 256).half().npu(), torch.ones(256, 16).half().npu(), name, 2 if size == 4 else 4
    ))  # fmt: skip


def products(rank: int, size: int) -> None:
    """The other products that are fused with collectives."""
    if not BF16 or size < 2:
        return
    name = comm_name(dist.group.WORLD)
    weight = torch.arange(256.0 * 16).view(256, 16).half() / 8192
    rows = [(torch.arange(512.0).view(2, 256) + 32 * r).half() / 512 for r in range(size)]
    product, gathered = torch_npu.npu_all_gather_base_mm(rows[rank].npu(), weight.npu(), name, size)
    assert torch.equal(gathered.cpu(), torch.cat(rows))
    torch.testing.assert_close(product.cpu().double(), torch.cat(rows).double() @ weight.double(), atol=2e-2, rtol=2e-2)
    part = torch_npu.npu_mm_reduce_scatter_base(torch.cat(rows).npu(), (weight * (rank + 1)).npu(), name, size)
    factor = size * (size + 1) / 2
    expected = rows[rank].double() @ weight.double() * factor
    torch.testing.assert_close(part.cpu().double(), expected, atol=5e-2, rtol=2e-2)


def experts(rank: int, size: int) -> None:
    """Dispatch, an expert e that multiplies by e + 1, combine."""
    if not BF16 or size < 2:
        return
    name = comm_name(dist.group.WORLD)
    count, k, width, tokens = 8, 2, 1024, 3
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, width, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(tokens)]).int()
    scales = torch.rand(tokens, k, generator=generator)
    expected = sum(x.double() * (ids[:, j : j + 1] + 1) * scales[:, j : j + 1].double() for j in range(k))
    for dispatch, combine, handle in (
        (torch_npu.npu_moe_distribute_dispatch, torch_npu.npu_moe_distribute_combine, "expand_idx"),
        (torch_npu.npu_moe_distribute_dispatch_v2, torch_npu.npu_moe_distribute_combine_v2, "assist_info_for_combine"),
    ):
        rows, _, info, numbers, received, _, row_scales = dispatch(
            x.npu(), ids.npu(), name, size, rank, count, expert_scales=scales.npu(), expert_token_nums_type=1
        )
        local = count // size
        host = rows.cpu().clone()
        start = 0
        for expert, number in enumerate(numbers.cpu().tolist()):
            host[start : start + number] *= rank * local + expert + 1
            start += number
        sums = torch.tensor(numbers.cpu().tolist()).sum().npu().float()
        dist.all_reduce(sums)
        assert sums.item() == tokens * k * size
        found = combine(
            host.npu(), ids.npu(), **{handle: info}, ep_send_counts=received, expert_scales=scales.npu(),
            group_ep=name, ep_world_size=size, ep_rank_id=rank, moe_expert_num=count, expand_scales=row_scales,
        )  # fmt: skip
        torch.testing.assert_close(found.cpu().double(), expected, atol=5e-2, rtol=2e-2)


def counted(rank: int, size: int) -> None:
    with measure() as report:
        dist.all_reduce(torch.ones(2).npu())
        dist.barrier()
    assert report.launches == {"hccl:allreduce": 1, "hccl:barrier": 1}, report.launches


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    torch.npu.set_device(rank)
    limit = timedelta(seconds=30)
    dist.init_process_group("hccl", init_method=sys.argv[3], rank=rank, world_size=size, timeout=limit)
    assert dist.get_backend() == "hccl"
    transfers = (reductions, further_reductions, gathers, uneven, objects, exchanges, messages)
    groups = (functional_collectives, functional_operators, subgroups, captured, refusals)
    for check in (*transfers, *groups, fused, quantised, products, experts, counted):
        check(rank, size)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
