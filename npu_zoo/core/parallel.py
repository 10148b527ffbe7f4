"""How ranks share a model, and how those that share something talk to each other."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_zoo.core.errors import EngineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Split:
    """How ranks share a model.

    Ranks count stage by stage, within a stage replica by replica: neighbours share layers, and an expert.

    Attributes:
        tp: ranks that share every layer of attention.
        pp: stages that share the stack of layers.
        ep: groups of ranks of a stage that each hold some whole experts.
        dp: replicas of the attention in a stage, each with sequences of its own; they share the experts.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1

    @property
    def stage_size(self) -> int:
        """Ranks of one stage."""
        return self.dp * self.tp

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.stage_size * self.pp

    @property
    def moe_tp(self) -> int:
        """Ranks that share one expert."""
        return max(1, self.stage_size // self.ep)

    def describe(self) -> str:
        """Such as ``8 (tp 8, ep 8)``; the number alone where there is tensor parallelism alone."""
        sizes = (("tp", self.tp), ("pp", self.pp), ("ep", self.ep), ("dp", self.dp))
        parts = [f"{kind} {size}" for kind, size in sizes if size > 1]
        return f"{self.world_size}" + (f" ({', '.join(parts)})" if self != Split(self.tp) else "")

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        stage, inside = divmod(rank, self.stage_size)
        replica, tp_rank = divmod(inside, self.tp)
        ep_rank, moe_tp_rank = divmod(inside, self.moe_tp)
        return Place(self, rank, stage, replica, tp_rank, ep_rank, moe_tp_rank)


@dataclass(frozen=True)
class Place:
    """One rank's place in a :class:`Split`.

    Attributes:
        stage: of the pipeline.
        replica: of the attention.
        tp_rank: its part of the layers.
        ep_rank, moe_tp_rank: which experts it holds, and which part of each.
    """

    split: Split
    rank: int
    stage: int
    replica: int
    tp_rank: int
    ep_rank: int
    moe_tp_rank: int

    @property
    def tp_group(self) -> tuple[int, ...]:
        """The ranks of its replica in its stage."""
        first = self.rank - self.tp_rank
        return tuple(range(first, first + self.split.tp))

    @property
    def dp_group(self) -> tuple[int, ...]:
        """The ranks of its stage that have its part of the layers, one per replica."""
        first = self._first_of_stage + self.tp_rank
        return tuple(first + replica * self.split.tp for replica in range(self.split.dp))

    @property
    def ep_group(self) -> tuple[int, ...]:
        """The ranks of its stage that have its part of other experts, one per group of experts."""
        first = self._first_of_stage + self.moe_tp_rank
        return tuple(first + group * self.split.moe_tp for group in range(self.split.ep))

    @property
    def pp_group(self) -> tuple[int, ...]:
        """The ranks that have its place in the other stages, by stage."""
        inside = self.rank - self._first_of_stage
        return tuple(stage * self.split.stage_size + inside for stage in range(self.split.pp))

    @property
    def is_last_stage(self) -> bool:
        """Whether the last layer and the head are here."""
        return self.stage == self.split.pp - 1

    def layers(self, num_layers: int) -> range:
        """The layers of its stage."""
        return stage_layers(num_layers, self.split.pp)[self.stage]

    def experts(self, num_experts: int) -> range:
        """The experts that it holds, whole or a part of each."""
        share = num_experts // self.split.ep
        return range(self.ep_rank * share, (self.ep_rank + 1) * share)

    @property
    def _first_of_stage(self) -> int:
        return self.stage * self.split.stage_size


def stage_layers(num_layers: int, stages: int) -> list[range]:
    """The layers of each pipeline stage, contiguous, none a layer longer than another, the longer ones first."""
    least, more = divmod(num_layers, stages)
    ends = [0]
    for number in range(stages):
        ends.append(ends[-1] + least + (number < more))
    return [range(start, end) for start, end in itertools.pairwise(ends)]


class Communicator(ABC):
    """One rank's view of a group of ranks.

    All of them call the same operations in the same order; tensors lie on the ranks' devices.

    Attributes:
        rank, size: this one's number in the group, and how many there are.
    """

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors, on each of them; ``x`` may be overwritten."""

    @abstractmethod
    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' tensors, one after the other along a dimension, on each of them."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[size * n, …] to [n, …]: the sum of all ranks' part with this rank's number."""

    @abstractmethod
    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """[sum(sent), …] to [sum(received), …]: the rows that each rank has for this one, in the order of ranks.

        Args:
            sent: how many of ``x``'s rows go to each rank, in their order.
            received: how many rows come from each.
        """

    @abstractmethod
    def send(self, x: Tensor, to: int) -> None:
        """Give a tensor to another rank, which receives it; returns before it has, and ``x`` must stay as it is."""

    @abstractmethod
    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        """What another rank sends to this one, in the order in which it does."""


class SingleRank(Communicator):
    """Nobody to talk to."""

    rank, size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The tensor itself."""
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """The tensor itself."""
        return x

    def send(self, x: Tensor, to: int) -> None:
        """There is nobody to send to."""
        raise EngineError(f"rank {self.rank} of {self.size} has no rank {to} to send to")

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        """There is nobody to receive from."""
        raise EngineError(f"rank {self.rank} of {self.size} has no rank {source} to receive from")


class Apart(SingleRank):
    """Ranks that each hold a part and have nothing to tell each other: the caller adds up what they compute."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


SINGLE = SingleRank()


@dataclass(frozen=True)
class Ranks:
    """One rank's place among all, and the groups that it talks in while it computes.

    Attributes:
        place: where it stands.
        tp: the ranks that share its attention layers.
        dp: the replicas, by the rank of each that has this one's part.
        ep: the groups of experts, by the rank of each that has this one's part.
        world: all ranks.
        minimum: the least of all ranks' numbers, on each of them.
        local_rank, local_size: its number among the ranks of this host, and how many they are.
    """

    place: Place
    tp: Communicator = SINGLE
    dp: Communicator = SINGLE
    ep: Communicator = SINGLE
    world: Communicator = SINGLE
    minimum: Callable[[int], int] = int
    local_rank: int = 0
    local_size: int = 1


ALONE = Ranks(Split().place(0))
