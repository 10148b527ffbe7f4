"""Gating, routing and the grouped products of experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from npu_zoo.simulator.activation import simulated_machine
from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden
from npu_zoo.simulator.operators.quantization import quantize_rows

CUMULATIVE, COUNTS = 0, 1
Results4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


@golden("npu::npu_moe_gating_top_k")
def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scores, a choice of groups, then of experts; the bias counts for the choice alone.

    Source: op-plugin, torch_npu-npu_moe_gating_top_k.md.
    """
    if input_ids is not None or tid2eid is not None:
        raise NoSemantics("npu_moe_gating_top_k: arguments input_ids and tid2eid have no golden semantics")
    scores = x.float().sigmoid() if norm_type == 1 else x.float().softmax(-1)
    choice = scores if bias is None else scores + bias.float()
    if group_count > 1:
        choice = _within_groups(choice, group_count, k_group, by_two_best=group_select_mode == 1)
    indices = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, indices)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = (weights * routed_scaling_factor).to(x.dtype)
    return weights, indices.int(), scores if out_flag else None


def _within_groups(choice: torch.Tensor, groups: int, kept: int, *, by_two_best: bool) -> torch.Tensor:
    """Minus infinity outside of each row's best groups, judged by their best score or the sum of their two best."""
    grouped = choice.view(choice.shape[0], groups, -1)
    value = grouped.topk(2, -1).values.sum(-1) if by_two_best else grouped.amax(-1)
    best = value.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    mask = torch.ones_like(value, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(mask[..., None], float("-inf")).flatten(1)


@golden("npu::npu_moe_gating_top_k_softmax")
def npu_moe_gating_top_k_softmax(
    x: torch.Tensor, finished: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax, then the k best, not renormalised; finished rows name expert E.

    Source: op-plugin, torch_npu-npu_moe_gating_top_k_softmax.md.
    """
    experts = x.shape[-1]
    scores, indices = x.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    indices = indices[..., :k].int()
    if finished is not None:
        indices = torch.where(finished[..., None], experts, indices)
    rows = x.shape[:-1].numel()
    row = torch.arange(rows * k, dtype=torch.int32).view(k, rows).t().reshape(indices.shape)
    return scores[..., :k].to(x.dtype), indices, row


@golden("npu::npu_moe_init_routing")
def npu_moe_init_routing(
    x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of x in the order of their experts. Source: op-plugin, torch_npu-npu_moe_init_routing.md."""
    tokens, k = expert_idx.shape
    experts, order = expert_idx.flatten().sort(stable=True)
    source = row_idx.flatten().long()[order]
    expanded_row = torch.empty(tokens * k, dtype=torch.int32)
    expanded_row[source] = torch.arange(tokens * k, dtype=torch.int32)
    kept = min(tokens, active_num) * k
    return x[source % tokens][:kept], expanded_row, experts.int()


@golden("npu::npu_moe_init_routing_v2")
def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> Results4:
    """Tokens in the order of their experts, without drops. Rows that no active expert takes are zero.

    ``active_num`` cuts the rows off, and not the indices into them.

    On 310P the numbers are cumulative whatever is asked for, and the fourth result is each expert's count.

    Source: op-plugin, torch_npu-npu_moe_init_routing_v2.md.
    """
    if drop_pad_mode or quant_mode not in (-1, 1) or offset is not None or x_dtype is not None:
        raise NoSemantics("npu_moe_init_routing_v2: only drop_pad_mode=0 and quant_mode -1 and 1 have golden semantics")
    tokens, k = expert_idx.shape
    first, end = tuple(active_expert_range) or (0, expert_num)
    flat = expert_idx.flatten()
    active = (flat >= first) & (flat < end)
    order = torch.where(active, flat, torch.iinfo(torch.int32).max).sort(stable=True).indices
    rows = tokens * k if active_num <= 0 else min(active_num, tokens * k)
    used = min(int(active.sum()), rows)
    expanded = torch.zeros(rows, x.shape[1], dtype=x.dtype)
    expanded[:used] = x[order[:used] // k]
    counts = torch.bincount((flat[active] - first).long(), minlength=end - first)
    row = _row_index(order, int(active.sum()), tokens * k, scattered=row_idx_type == 1)
    if _on_310p():
        return expanded, row, counts.cumsum(0).int(), torch.bincount(flat.long(), minlength=expert_num).int()
    kind = expert_tokens_num_type if expert_tokens_num_flag else None
    tokens_per_expert = _token_numbers(counts, first, expert_num, kind)
    if quant_mode == 1:
        smooth = None if scale is None else scale.float()[(flat[order[:used]] - first).long() % scale.shape[0]]
        codes, scales = _quantized(expanded, smooth, used)
        return codes, row, tokens_per_expert, scales
    expanded_scale = torch.zeros(rows) if scale is None else _scales(scale, order, k, rows, used)
    return expanded, row, tokens_per_expert, expanded_scale


def _on_310p() -> bool:
    machine = simulated_machine()
    return machine is not None and machine.chip == "ascend310p"


def _row_index(order: torch.Tensor, used: int, total: int, *, scattered: bool) -> torch.Tensor:
    if scattered:
        return order.int()
    row = torch.full((total,), -1, dtype=torch.int32)
    row[order[:used]] = torch.arange(used, dtype=torch.int32)
    return row


def _token_numbers(counts: torch.Tensor, first: int, experts: int, kind: int | None) -> torch.Tensor | None:
    if kind is None:
        return None
    if kind == CUMULATIVE:
        return counts.cumsum(0)
    if kind == COUNTS:
        return counts
    pairs = torch.stack([torch.arange(first, first + len(counts)), counts], 1)[counts > 0]
    return torch.cat([pairs, torch.zeros(experts - len(pairs), 2, dtype=torch.int64)])


def _scales(scale: torch.Tensor, order: torch.Tensor, k: int, rows: int, used: int) -> torch.Tensor:
    expanded = torch.zeros(rows)
    expanded[:used] = scale.float()[order[:used] // k]
    return expanded


def _quantized(x: torch.Tensor, smooth: torch.Tensor | None, used: int) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    if smooth is not None:
        wide[:used] = wide[:used] * smooth
    return quantize_rows(wide)


@golden("npu::npu_moe_compute_expert_tokens")
def npu_moe_compute_expert_tokens(sorted_expert_for_source_row: torch.Tensor, num_expert: int) -> torch.Tensor:
    """Where each expert's rows end. Source: op-plugin, torch_npu-npu_moe_compute_expert_tokens.md."""
    experts = torch.arange(num_expert, dtype=sorted_expert_for_source_row.dtype)
    return torch.searchsorted(sorted_expert_for_source_row, experts, right=True, out_int32=True)


@golden("npu::npu_moe_token_permute")
def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Source: op-plugin, torch_npu-npu_moe_token_permute.md."""
    if padded_mode:
        raise NoSemantics("npu_moe_token_permute: padded_mode=True has no golden semantics")
    k = 1 if indices.dim() == 1 else indices.shape[1]
    order = indices.flatten().sort(stable=True).indices
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel())
    kept = num_out_tokens or order.numel()
    return tokens[order[:kept] // k], position.int()


@golden("npu::npu_moe_token_unpermute")
def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's rows. Source: op-plugin, torch_npu-npu_moe_token_unpermute.md."""
    if padded_mode:
        raise NoSemantics("npu_moe_token_unpermute: padded_mode=True has no golden semantics")
    k = 1 if probs is None else probs.shape[1]
    rows = permuted_tokens.float()[sorted_indices.long()].view(-1, k, permuted_tokens.shape[-1])
    if probs is not None:
        rows = rows * probs.float()[..., None]
    return rows.sum(1).to(permuted_tokens.dtype)


@golden("npu::npu_moe_finalize_routing")
def npu_moe_finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int = 0,
    k: int = 1,
) -> torch.Tensor:
    """The weighted sum of each token's rows, the skips added.

    Source: op-plugin, torch_npu-npu_moe_finalize_routing.md.
    """
    if drop_pad_mode not in (0, 2):
        raise NoSemantics(f"npu_moe_finalize_routing: drop_pad_mode={drop_pad_mode} has no golden semantics")
    k = 1 if scales is None else scales.shape[1]
    index = expanded_src_to_dst_row.long()
    index = index.view(k, -1).t() if drop_pad_mode == 0 else index.view(-1, k)
    rows = expanded_permuted_rows.float()[index]
    if bias is not None and export_for_source_row is not None:
        rows = rows + bias.float()[export_for_source_row.long()]
    total = (rows if scales is None else rows * scales.float()[..., None]).sum(1)
    for skip in (skip1, skip2):
        total = total if skip is None else total + skip.float()
    return total.to(expanded_permuted_rows.dtype)
