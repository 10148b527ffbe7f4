"""One rank of tests/npu/test_distributed.py: checks every collective against a closed form, and exits with 0."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch_npu

from npu_zoo.simulator import measure

BF16 = "310" not in torch.npu.get_device_name(0)


def ranks_of(rank: int, size: int) -> torch.Tensor:
    return torch.arange(6.0).view(2, 3) + 10 * rank


def reductions(rank: int, size: int) -> None:
    total = sum(ranks_of(r, size) for r in range(size))
    for dtype in (torch.float32, torch.float16, torch.int64, *([torch.bfloat16] if BF16 else [])):
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


def subgroups(rank: int, size: int) -> None:
    pairs = [dist.new_group([i, i + 1]) for i in range(0, size - 1, 2)]
    if pairs:
        x = torch.tensor([float(rank)]).npu()
        dist.all_reduce(x, group=pairs[rank // 2])
        assert x.item() == 4 * (rank // 2) + 1


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
    try:
        with torch.npu.graph(torch.npu.NPUGraph()):
            dist.barrier()
    except RuntimeError as error:
        assert "captured" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a barrier was captured")
    torch.npu.set_stream(torch.npu.default_stream())


def refusals(rank: int, size: int) -> None:
    for tensor, word in ((torch.ones(2), "NPU"), (torch.ones(4, 4).npu().t(), "contiguous")):
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            assert word in str(error), error  # noqa: PT017
        else:
            raise AssertionError(f"{word} was not asked for")


def fused(rank: int, size: int) -> None:
    if not BF16:
        return
    backend = dist.group.WORLD._get_backend(torch.device("npu"))
    name = backend.get_hccl_comm_name(rank)
    x = (torch.arange(8.0).view(2, 4) * (rank + 1)).half()
    weight = torch.eye(4).half()
    found = torch_npu.npu_mm_all_reduce_base(x.npu(), weight.npu(), name)
    assert torch.equal(found.cpu(), (torch.arange(8.0).view(2, 4) * (size * (size + 1) / 2)).half())


def products(rank: int, size: int) -> None:
    """The other products that are fused with collectives."""
    if not BF16 or size < 2:
        return
    name = dist.group.WORLD._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
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
    name = dist.group.WORLD._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
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
    assert report.launches["hccl:allreduce"] == 1, report.launches


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=size)
    assert dist.get_backend() == "hccl"
    transfers = (reductions, gathers, exchanges, functional_collectives, subgroups)
    for check in (*transfers, captured, refusals, fused, products, experts, counted):
        check(rank, size)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
