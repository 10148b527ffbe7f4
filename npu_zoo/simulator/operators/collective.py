"""Products fused with collectives (MC2): the product, and the same group's collective."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from npu_zoo.simulator.errors import NoSemantics, OperatorError
from npu_zoo.simulator.golden import golden
from npu_zoo.simulator.operators.quantization import dequantized, dtype_of, scale_values

if TYPE_CHECKING:
    from npu_zoo.simulator.distributed import HcclGroup

OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def _group(operator: str, hcom: str, world_size: int | None = None) -> HcclGroup:
    from npu_zoo.simulator.distributed import group_of

    group = group_of(hcom)
    if world_size not in (None, group.size()):
        raise OperatorError(f"{operator}: world_size is {world_size}, and the group of hcom has {group.size()} ranks")
    return group


def _product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = torch.float32 if left.dtype.is_floating_point else torch.float64  # sums of int8 products stay exact
    product = left.to(wide) @ right.to(wide)
    return product if bias is None else product + bias.to(wide)


def _scaled(product: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
    if columns is not None:
        product = product * scale_values(columns)
    return product if rows is None else product * rows.float().view(*product.shape[:-1], 1)


def _output_dtype(
    operator: str,
    x: torch.Tensor,
    x1_scale: torch.Tensor | None,
    x2_scale: torch.Tensor | None,
    output_dtype: torch.dtype | None,
) -> torch.dtype:
    if x2_scale is None and (x1_scale is not None or output_dtype is not None):
        raise NoSemantics(f"{operator}: x1_scale and output_dtype without x2_scale have no golden semantics")
    if x2_scale is None:
        return x.dtype
    if x2_scale.dtype is torch.int64:
        return torch.float16
    return dtype_of(operator, output_dtype, torch.bfloat16)


@golden("npu::npu_mm_all_reduce_base")
def npu_mm_all_reduce_base(
    x1: torch.Tensor,
    x2: torch.Tensor,
    hcom: str,
    reduce_op: str = "sum",
    bias: torch.Tensor | None = None,
    antiquant_scale: torch.Tensor | None = None,
    antiquant_offset: torch.Tensor | None = None,
    x3: torch.Tensor | None = None,
    dequant_scale: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    comm_turn: int = 0,
    comm_mode: str | None = None,
    **unsupported: object,
) -> torch.Tensor:
    """``all_reduce(x1 @ x2 + bias + x3)``, each rank's term rounded before the sum.

    Source: op-plugin, torch_npu-npu_mm_all_reduce_base.md.
    """
    given = sorted(name for name, value in unsupported.items() if value)
    if given:
        raise NoSemantics(f"npu_mm_all_reduce_base: arguments {', '.join(given)} have no golden semantics")
    if antiquant_group_size and len(x2) % antiquant_group_size:
        raise NoSemantics("npu_mm_all_reduce_base: a last group that is shorter has no golden semantics")
    weight = x2 if antiquant_scale is None else dequantized(x2, antiquant_scale, antiquant_offset)
    partial = _scaled(_product(x1, weight, bias), pertoken_scale, dequant_scale)
    if x3 is not None:
        partial = partial + x3.float()
    dtype = x1.dtype
    if dequant_scale is not None:
        dtype = torch.bfloat16 if dequant_scale.dtype is torch.bfloat16 else torch.float16
    return _group("npu_mm_all_reduce_base", hcom).reduce_all(partial.to(dtype), OPERATIONS[reduce_op])


@golden("npu::npu_all_gather_base_mm")
def npu_all_gather_base_mm(
    input: torch.Tensor,
    x2: torch.Tensor,
    hcom: str,
    world_size: int,
    bias: torch.Tensor | None = None,
    x1_scale: torch.Tensor | None = None,
    x2_scale: torch.Tensor | None = None,
    gather_index: int = 0,
    gather_output: bool = True,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``all_gather(input) @ x2``, and what was gathered. Source: op-plugin, torch_npu-npu_all_gather_base_mm.md."""
    if gather_index:
        raise NoSemantics("npu_all_gather_base_mm: only gather_index=0 has golden semantics")
    dtype = _output_dtype("npu_all_gather_base_mm", input, x1_scale, x2_scale, output_dtype)
    group = _group("npu_all_gather_base_mm", hcom, world_size)
    gathered = torch.cat(group.gather_all(input))
    rows = None if x1_scale is None else torch.cat(group.gather_all(x1_scale))
    product = _scaled(_product(gathered, x2, bias), rows, x2_scale)
    return product.to(dtype), gathered if gather_output else None


@golden("npu::npu_mm_reduce_scatter_base")
def npu_mm_reduce_scatter_base(
    input: torch.Tensor,
    x2: torch.Tensor,
    hcom: str,
    world_size: int,
    reduce_op: str = "sum",
    bias: torch.Tensor | None = None,
    x1_scale: torch.Tensor | None = None,
    x2_scale: torch.Tensor | None = None,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> torch.Tensor:
    """This rank's rows of ``all_reduce(input @ x2)``. Source: op-plugin, torch_npu-npu_mm_reduce_scatter_base.md."""
    dtype = _output_dtype("npu_mm_reduce_scatter_base", input, x1_scale, x2_scale, output_dtype)
    group = _group("npu_mm_reduce_scatter_base", hcom, world_size)
    partial = _scaled(_product(input, x2, bias), x1_scale, x2_scale)
    total = group.reduce_all(partial.to(dtype), OPERATIONS[reduce_op])
    mine: torch.Tensor = total.chunk(world_size)[group.rank()]
    return mine
