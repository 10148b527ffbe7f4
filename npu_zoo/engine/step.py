"""A step as plain data: what travels to every rank that computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from npu_zoo.core.attention import SequenceSlice
from npu_zoo.engine.scheduler import ScheduledRow


@dataclass(frozen=True)
class StepRow:
    """One sequence's share of a step.

    Attributes:
        token_ids: the tokens that are computed, from position ``start`` on.
        slots: where the sequence's keys and values lie; the sequence's own table, which stays as it is during the step.
        num_logits: how many of the last of them give logits that a next token is drawn from: none where the row ends
            inside the prompt, one after the sequence's last token, and one more after each draft.
        wants_prompt: whether the hidden states of all of them are asked for.
        replica: of the attention, whose cache holds the sequence.
    """

    token_ids: tuple[int, ...]
    start: int
    slots: Sequence[int]
    num_logits: int
    wants_prompt: bool
    replica: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.token_ids)

    @property
    def samples(self) -> bool:
        """Whether a next token is drawn."""
        return self.num_logits > 0

    @property
    def decodes(self) -> bool:
        """Whether it is the sequence's last token, with drafts or not, and nothing of its prompt is asked for."""
        return len(self.token_ids) == self.num_logits and not self.wants_prompt

    @property
    def slices(self) -> list[SequenceSlice]:
        """As an attention backend takes it: tokens that are all sampled from one by one, others together.

        Each reads what those before it write in the same step. So drafts are attended to as plain decoding would, from
        captured graphs too.
        """
        if not self.decodes:
            return [SequenceSlice(self.start, len(self.token_ids), self.slots)]
        return [SequenceSlice(position, 1, self.slots) for position in self.positions]

    @property
    def positions(self) -> range:
        """Of its tokens."""
        return range(self.start, self.start + len(self.token_ids))


def step_rows(rows: Sequence[ScheduledRow]) -> list[StepRow]:
    """What the scheduler chose, as plain data."""
    return [_step_row(row) for row in rows]


def _step_row(row: ScheduledRow) -> StepRow:
    sequence, scores = row.sequence, row.sequence.prompt_scores
    return StepRow(
        token_ids=(*sequence.token_ids[row.start : row.start + row.num_known], *row.drafts),
        start=row.start,
        slots=sequence.slots,
        num_logits=row.num_sampled,
        wants_prompt=scores is not None and scores.wants(row.start, row.num_tokens),
        replica=sequence.replica,
    )


@dataclass(frozen=True)
class MicroBatch:
    """What a pipeline's stage computes at once, by replica of the attention."""

    rows: tuple[tuple[StepRow, ...], ...]

    @property
    def replica_tokens(self) -> tuple[int, ...]:
        """How many tokens each replica computes."""
        return tuple(sum(row.num_tokens for row in rows) for rows in self.rows)


def largest_replica(rows: Sequence[StepRow], replicas: int) -> int:
    """The most tokens that any replica of the attention computes in a step."""
    return max(sum(row.num_tokens for row in rows if row.replica == number) for number in range(replicas))


MICRO_BATCH_TOKENS = 64
"""Fewer tokens take a stage about as long as this many, since it reads all of its weights for them."""


def micro_batches(rows: Sequence[StepRow], replicas: int, stages: int) -> list[MicroBatch]:
    """A step as the parts that pass through a pipeline one behind the other, so that its stages work at once.

    There are as many as stages, or fewer where they would have less than :data:`MICRO_BATCH_TOKENS` tokens. Rows stay
    in their order; one may be cut in two, since the first part's keys and values are there before the second's turn.
    """
    if replicas == stages == 1:
        return [MicroBatch((tuple(rows),))]
    by_replica = [[row for row in rows if row.replica == number] for number in range(replicas)]
    largest = max(sum(row.num_tokens for row in own) for own in by_replica)
    parts = max(1, min(stages, largest // MICRO_BATCH_TOKENS))
    columns = [_cut(own, parts) for own in by_replica]
    return [MicroBatch(batch) for batch in zip(*columns, strict=True)]


def _cut(rows: Sequence[StepRow], parts: int) -> list[tuple[StepRow, ...]]:
    """Rows in stretches of about as many tokens each, all tokens in their order."""
    total = sum(row.num_tokens for row in rows)
    ends = [total * (number + 1) // parts for number in range(parts)]
    found: list[list[StepRow]] = [[] for _ in ends]
    part = done = 0
    for row in rows:
        taken = 0
        while taken < row.num_tokens:
            while done == ends[part]:
                part += 1
            count = min(row.num_tokens - taken, ends[part] - done)
            found[part].append(_piece(row, taken, count))
            taken, done = taken + count, done + count
    return [tuple(own) for own in found]


def _piece(row: StepRow, first: int, count: int) -> StepRow:
    ids = row.token_ids[first : first + count]
    unsampled = row.num_tokens - row.num_logits
    logits = max(0, first + count - max(first, unsampled))
    return replace(row, token_ids=ids, start=row.start + first, num_logits=logits)
