"""What became of steps, as the layer that predicts further tokens is told of them, and the order of its drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STEPS_AT_ONCE = 16
"""Steps that may wait until the layer sees them: a pass over many costs about what one over the last of them does."""


@dataclass(frozen=True)
class DraftRow:
    """What became of one row of a step.

    Attributes:
        following: the tokens behind those of the row's tokens that stand, which are its first.
        slots: where the sequence's keys and values lie, with room for ``count - 1`` tokens more; unread where
            nothing is to be guessed.
        count: drafts that are wanted; of the last step's rows alone.
    """

    following: tuple[int, ...]
    slots: tuple[int, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class SeenStep:
    """A step for the layer to see.

    Attributes:
        number: of the step, as runners count.
        rows: what became of its rows, in their order.
    """

    number: int
    rows: tuple[DraftRow, ...]


def by_row(rows: Sequence[DraftRow], drafts: Sequence[int]) -> list[list[int]]:
    """What :meth:`npu_zoo.engine.speculation.layer.MtpDrafter.draft` gives, row by row."""
    found: list[list[int]] = [[] for _ in rows]
    order = most_first(rows)
    of_draft = (
        n for depth in range(max((row.count for row in rows), default=0)) for n in order if rows[n].count > depth
    )
    for n, draft in zip(of_draft, drafts, strict=False):
        found[n].append(draft)
    return found


def most_first(rows: Sequence[DraftRow]) -> list[int]:
    """The rows that want drafts, those first that want most, so that those which want one more are always the first."""
    return sorted((n for n, row in enumerate(rows) if row.count), key=lambda n: -rows[n].count)
