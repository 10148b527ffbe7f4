"""How tokens reach the experts that other ranks hold, and how what those make of them comes back.

Both ways give each rank its replica's tokens with a share of their experts' outputs, which the ranks of the replica
then add up. ``all_gather`` has every rank compute all tokens' share of its own experts, and knows all sizes on the
host, which a captured step needs. ``all_to_all`` sends each token only to the ranks of its experts; how many go where
depends on the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from npu_zoo.core.parallel import Ranks

Route = Callable[[Tensor], tuple[Tensor, Tensor]]
"""[T, hidden_size] to weights and ids [T, top_k] of the experts of each token."""


class Experts(Protocol):
    """This rank's experts."""

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, *, elsewhere: bool) -> Tensor:
        """[T, hidden_size] to [T, hidden_size]; ids count this rank's experts, and their number means another rank's.

        Args:
            elsewhere: whether there may be such ids.
        """


class Dispatch(Protocol):
    """One of the ways."""

    def __call__(self, x: Tensor, replica_tokens: Sequence[int]) -> Tensor:
        """A replica's tokens [T, hidden_size] to a share of their experts' outputs; the replica's ranks sum them.

        Args:
            replica_tokens: how many each replica of the attention has; not needed where there is but one.
        """


class AllGather:
    """Every token to every replica; each rank computes what its own experts have to do with them.

    Args:
        ranks: this rank's groups.
        held: the experts that it holds, whole or a part of each.
        num_experts: in all.
    """

    def __init__(self, ranks: Ranks, held: range, num_experts: int, route: Route, experts: Experts) -> None:
        self._dp, self._held, self._shared = ranks.dp, held, len(held) < num_experts
        self._route, self._experts = route, experts

    def __call__(self, x: Tensor, replica_tokens: Sequence[int]) -> Tensor:
        """See :class:`Dispatch`."""
        if self._dp.size == 1:
            return self._compute(x, None)
        longest, size = max(replica_tokens), len(x)
        padded = x if size == longest else torch.cat((x, x.new_zeros(longest - size, x.shape[1])))
        everybody = self._dp.all_gather(padded, 0)
        uneven = min(replica_tokens) < longest
        share = self._compute(everybody, _padding(replica_tokens, x.device) if uneven else None)
        return self._dp.reduce_scatter(share)[:size]

    def _compute(self, x: Tensor, padding: Tensor | None) -> Tensor:
        weights, ids = self._route(x)
        if self._shared:
            local = ids - self._held.start
            ids = local.where((local >= 0) & (local < len(self._held)), len(self._held))
        if padding is not None:
            ids = ids.masked_fill(padding.unsqueeze(1), len(self._held))
        return self._experts(x, ids, weights, elsewhere=self._shared or padding is not None)


def _padding(counts: Sequence[int], device: torch.device) -> Tensor:
    """Which rows of replicas' tokens, each as many as the largest has, are nobody's."""
    longest = max(counts)
    rows = [torch.arange(longest) >= count for count in counts]
    return torch.cat(rows).to(device)


class AllToAll:
    """Each token to the ranks of its experts, and back.

    Within a replica every group of experts sends a share of the tokens, so that none travels twice; of a group's
    ranks, which have the same tokens, each talks to those that hold its part of the other experts.

    Args:
        ranks: this rank's groups; the ranks that share an expert are ranks of one replica.
        held, num_experts, route, experts: see :class:`AllGather`.
    """

    def __init__(self, ranks: Ranks, held: range, num_experts: int, route: Route, experts: Experts) -> None:
        place = ranks.place
        self._ep, self._held, self._num_experts = ranks.ep, held, num_experts
        self._route, self._experts = route, experts
        self._shares, self._share = place.split.tp // place.split.moe_tp, place.tp_rank // place.split.moe_tp

    def __call__(self, x: Tensor, replica_tokens: Sequence[int]) -> Tensor:
        """See :class:`Dispatch`."""
        first, last = (len(x) * number // self._shares for number in (self._share, self._share + 1))
        result = torch.zeros_like(x)
        result[first:last] = self._dispatch(x[first:last])
        return result

    def _dispatch(self, x: Tensor) -> Tensor:
        weights, ids = self._route(x) if len(x) else _no_choice(x.device)
        # As floats, which are exact here: NPUs have no fast kernel that sorts integers.
        order = ids.flatten().float().argsort(stable=True)  # [T * top_k], where each expert's tokens stand together
        tokens = order.div(ids.shape[1], rounding_mode="floor")
        sent = ids.flatten().bincount(minlength=self._num_experts)
        received = self._exchange_counts(sent)  # [ep, held]
        to, source = sent.view(self._ep.size, -1).sum(1).tolist(), received.sum(1).tolist()
        arrived = self._ep.all_to_all(x.index_select(0, tokens), to, source)
        returned = self._ep.all_to_all(self._compute(arrived, received), source, to)
        scaled = returned * weights.flatten()[order].unsqueeze(1)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return total.index_add_(0, tokens, scaled.float()).to(x.dtype)

    def _exchange_counts(self, sent: Tensor) -> Tensor:
        even = [len(self._held)] * self._ep.size
        return self._ep.all_to_all(sent, even, even).view(self._ep.size, -1)

    def _compute(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows that came rank by rank, and of each rank expert by expert."""
        if not len(x):
            return x
        numbers = torch.arange(len(self._held), device=x.device).repeat(len(counts))
        ids = numbers.repeat_interleave(counts.flatten()).unsqueeze(1)
        weights = torch.ones(len(x), 1, dtype=torch.float32, device=x.device)
        return self._experts(x, ids, weights, elsewhere=False)


def _no_choice(device: torch.device) -> tuple[Tensor, Tensor]:
    """The weights and ids of no tokens, which no kernel need take."""
    return torch.zeros(0, 1, device=device), torch.zeros(0, 1, dtype=torch.long, device=device)
