"""A step as plain data: what travels to every rank that computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npu_zoo.core.attention import SequenceSlice
from npu_zoo.engine.scheduler import ScheduledRow


@dataclass(frozen=True)
class StepRow:
    """One sequence's share of a step.

    Attributes:
        token_ids: the tokens that are computed, from position ``start`` on.
        slots: where the sequence's keys and values lie.
        samples: whether the last of them gives the logits that the next token is drawn from.
        wants_prompt: whether the hidden states of all of them are asked for.
    """

    token_ids: tuple[int, ...]
    start: int
    slots: tuple[int, ...]
    samples: bool
    wants_prompt: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.token_ids)

    @property
    def decodes(self) -> bool:
        """Whether it is one token that samples, and nothing of its prompt is asked for."""
        return len(self.token_ids) == 1 and self.samples and not self.wants_prompt

    @property
    def slice(self) -> SequenceSlice:
        """As an attention backend takes it."""
        return SequenceSlice(self.start, len(self.token_ids), self.slots)


def step_rows(rows: Sequence[ScheduledRow]) -> list[StepRow]:
    """What the scheduler chose, as plain data."""
    return [_step_row(row) for row in rows]


def _step_row(row: ScheduledRow) -> StepRow:
    sequence = row.sequence
    return StepRow(
        token_ids=tuple(sequence.token_ids[row.start : row.start + row.num_tokens]),
        start=row.start,
        slots=tuple(sequence.slots),
        samples=row.samples,
        wants_prompt=sequence.wants_prompt_logprobs and row.start < sequence.num_prompt_tokens,
    )
