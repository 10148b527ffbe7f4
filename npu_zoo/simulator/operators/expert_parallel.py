"""Tokens sent to the ranks of their experts, and back (MC2 dispatch and combine), without shared experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from npu_zoo.simulator.errors import NoSemantics, OperatorError
from npu_zoo.simulator.golden import Fitted, golden
from npu_zoo.simulator.operators.quantization import quantize_rows

ASSIST_WIDTH = 128
"""int32 values per received row in what combine_v2 is told by dispatch_v2."""

NOBODY = -1


@dataclass(frozen=True)
class Traffic:
    """Who sends what to whom.

    Attributes:
        experts: [ranks, tokens, k] of every rank, padded with -1.
        local: experts per rank.
    """

    experts: torch.Tensor
    local: int

    def received(self, rank: int) -> list[tuple[int, int, int, int]]:
        """(expert, source, token, slot) of the rows that a rank receives, in the order in which they lie there."""
        mine = (self.experts >= rank * self.local) & (self.experts < (rank + 1) * self.local)
        rows = [(int(self.experts[s, t, j]), s, t, j) for s, t, j in mine.nonzero().tolist()]
        return sorted(rows)


def _group(name: str) -> Any:
    from npu_zoo.simulator.distributed import group_of

    return group_of(name)


def _traffic(group: Any, expert_ids: torch.Tensor, experts: int, global_bs: int) -> Traffic:
    ranks = group.size()
    tokens = global_bs // ranks if global_bs else len(expert_ids)
    padded = torch.full((tokens, expert_ids.shape[1]), NOBODY, dtype=torch.int64)
    padded[: len(expert_ids)] = expert_ids
    return Traffic(torch.stack(group.gather_all(padded)), experts // ranks)


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _refuse(operator: str, others: dict[str, object]) -> None:
    allowed = {"expert_shard_type", "shared_expert_num", "tp_rank_id", "group_tp", "comm_alg"}
    meant = {name: value for name, value in others.items() if name not in allowed and value is not None}
    given = [name for name, value in meant.items() if not isinstance(value, int) or value]
    if others.get("tp_world_size") in (0, 1):
        given = [name for name in given if name != "tp_world_size"]
    if given:
        raise NoSemantics(f"{operator}: arguments {', '.join(sorted(given))} have no golden semantics")


@golden("npu::npu_moe_distribute_dispatch", "npu::npu_moe_distribute_dispatch_v2")
def npu_moe_distribute_dispatch(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    expert_scales: torch.Tensor | None = None,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    **others: object,
) -> tuple[Any, ...]:
    """Rows in the order of their experts, then their sources.

    Source: op-plugin, torch_npu-npu_moe_distribute_dispatch.md and _v2.md; the last results are between this operator
    and combine, and are laid out here as they are needed.
    """
    _refuse("npu_moe_distribute_dispatch", others)
    group = _group(group_ep)
    traffic = _traffic(group, expert_ids, moe_expert_num, global_bs)
    ranks, tokens, k = traffic.experts.shape
    every_x = torch.stack(group.gather_all(_padded(x, tokens)))
    received = traffic.received(ep_rank_id)
    rows = torch.stack([every_x[s, t] for _, s, t, _ in received]) if received else x[:0]
    capacity = tokens * ranks * min(traffic.local, k)
    scales = torch.zeros(capacity)
    if quant_mode == 2:
        rows, row_scales = quantize_rows(rows)
        scales[: len(rows)] = row_scales
    counts = torch.zeros(traffic.local, ranks, dtype=torch.int64)
    for expert, source, _, _ in received:
        counts[expert - ep_rank_id * traffic.local, source] += 1
    per_expert = counts.sum(1)
    numbers = per_expert if expert_token_nums_type == 1 else per_expert.cumsum(0)
    assist = torch.zeros(capacity, ASSIST_WIDTH, dtype=torch.int32)
    for row, (_, *origin) in enumerate(received):
        assist[row, :3] = torch.tensor(origin, dtype=torch.int32)
    return (
        _padded(rows, capacity),
        scales if quant_mode == 2 else None,
        Fitted(_sent_before(expert_ids), assist),
        numbers,
        Fitted(counts.flatten().cumsum(0).int()),
        None,
        Fitted(_received_scales(group, expert_scales, traffic, received, capacity)),
    )


def _sent_before(expert_ids: torch.Tensor) -> torch.Tensor:
    """For each (token, slot), how many of this rank's rows go to the same expert before it."""
    seen: dict[int, int] = {}
    found = []
    for expert in expert_ids.flatten().tolist():
        found.append(seen.get(expert, 0))
        seen[expert] = found[-1] + 1
    return torch.tensor(found, dtype=torch.int32)


def _received_scales(
    group: Any,
    expert_scales: torch.Tensor | None,
    traffic: Traffic,
    received: list[tuple[int, int, int, int]],
    capacity: int,
) -> torch.Tensor | None:
    if expert_scales is None:
        return None
    every = torch.stack(group.gather_all(_padded(expert_scales.float(), traffic.experts.shape[1])))
    scales = torch.zeros(capacity)
    for row, (_, source, token, slot) in enumerate(received):
        scales[row] = every[source, token, slot]
    return scales


@golden("npu::npu_moe_distribute_combine", "npu::npu_moe_distribute_combine_v2")
def npu_moe_distribute_combine(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    expand_idx: torch.Tensor | None = None,
    assist_info_for_combine: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    global_bs: int = 0,
    **others: object,
) -> torch.Tensor:
    """The weighted sum of each token's rows, fetched from the ranks of its experts.

    Source: op-plugin, torch_npu-npu_moe_distribute_combine.md and _v2.md.

    Raises:
        OperatorError: the counts are not those of the dispatch that these rows come from.
    """
    _refuse("npu_moe_distribute_combine", others)
    group = _group(group_ep)
    traffic = _traffic(group, expert_ids, moe_expert_num, global_bs)
    layouts = [traffic.received(rank) for rank in range(group.size())]
    total = traffic.local * group.size()
    if int(ep_send_counts[total - 1]) != len(layouts[ep_rank_id]):
        raise OperatorError("npu_moe_distribute_combine: ep_send_counts is not what dispatch gave for these experts")
    every = group.gather_all(expand_x)
    output = torch.zeros(len(expert_ids), expand_x.shape[1])
    for rank, rows in enumerate(layouts):
        for row, (_, source, token, slot) in enumerate(rows):
            if source == ep_rank_id:
                output[token] += every[rank][row].float() * float(expert_scales[token, slot])
    return output.to(expand_x.dtype)
