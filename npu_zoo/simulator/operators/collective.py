"""Products fused with collectives (MC2): the product, and the same group's collective."""

from __future__ import annotations

import torch
import torch.distributed as dist

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden

OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def _product(
    operator: str, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, others: dict[str, object]
) -> torch.Tensor:
    given = sorted(name for name, value in others.items() if value)
    if given:
        raise NoSemantics(f"{operator}: arguments {', '.join(given)} have no golden semantics")
    product = left.float() @ right.float()
    return (product if bias is None else product + bias.float()).to(left.dtype)


@golden("npu::npu_mm_all_reduce_base")
def npu_mm_all_reduce_base(
    x1: torch.Tensor,
    x2: torch.Tensor,
    hcom: str,
    reduce_op: str = "sum",
    bias: torch.Tensor | None = None,
    x3: torch.Tensor | None = None,
    comm_turn: int = 0,
    **quantised: object,
) -> torch.Tensor:
    """``all_reduce(x1 @ x2 + bias) + x3``. Source: op-plugin, torch_npu-npu_mm_all_reduce_base.md."""
    from npu_zoo.simulator.distributed import group_of

    product = _product("npu_mm_all_reduce_base", x1, x2, bias, quantised)
    total = group_of(hcom).reduce_all(product, OPERATIONS[reduce_op])
    return total if x3 is None else (total.float() + x3.float()).to(total.dtype)


@golden("npu::npu_all_gather_base_mm")
def npu_all_gather_base_mm(
    input: torch.Tensor,
    x2: torch.Tensor,
    hcom: str,
    world_size: int,
    bias: torch.Tensor | None = None,
    gather_index: int = 0,
    gather_output: bool = True,
    comm_turn: int = 0,
    **quantised: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``all_gather(input) @ x2``, and what was gathered. Source: op-plugin, torch_npu-npu_all_gather_base_mm.md."""
    from npu_zoo.simulator.distributed import group_of

    if gather_index:
        raise NoSemantics("npu_all_gather_base_mm: only gather_index=0 has golden semantics")
    gathered = torch.cat(group_of(hcom).gather_all(input))
    product = _product("npu_all_gather_base_mm", gathered, x2, bias, quantised)
    return product, gathered if gather_output else None


@golden("npu::npu_mm_reduce_scatter_base")
def npu_mm_reduce_scatter_base(
    input: torch.Tensor,
    x2: torch.Tensor,
    hcom: str,
    world_size: int,
    reduce_op: str = "sum",
    bias: torch.Tensor | None = None,
    comm_turn: int = 0,
    **quantised: object,
) -> torch.Tensor:
    """This rank's rows of ``all_reduce(input @ x2)``. Source: op-plugin, torch_npu-npu_mm_reduce_scatter_base.md."""
    from npu_zoo.simulator.distributed import group_of

    group = group_of(hcom)
    total = group.reduce_all(_product("npu_mm_reduce_scatter_base", input, x2, bias, quantised), OPERATIONS[reduce_op])
    mine: torch.Tensor = total.chunk(world_size)[group.rank()]
    return mine
