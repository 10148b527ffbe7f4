"""What a runner knows of the ways to decode without going through the model's code."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from npu_zoo.core.attention import SequenceSlice


class DecodePath(ABC):
    """Computes steps of single tokens, and of drafts, from what was prepared for their batch size."""

    @property
    @abstractmethod
    def form(self) -> str:
        """How steps are computed, for people to read."""

    @abstractmethod
    def run(
        self, given: list[int] | Tensor, rows: list[SequenceSlice], largest: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """Compute B rows of one token each.

        Args:
            given: the rows' tokens, or the [B, hidden_size] of the stage before.
            rows: where their keys and values lie.
            largest: the most rows that any replica of the attention has in this step.

        Returns:
            [B, vocab_size] logits, or what the next stage takes; and the [B, hidden_size] that drafts are made of, or
            None where the run makes none of them. The next run overwrites both. None where the step has to be computed
            as others are, which happens to no rows of a stage before.
        """
