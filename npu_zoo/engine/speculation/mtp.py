"""Drafts by the checkpoint's own layer for further tokens: what it is told of each step, and how far it may guess."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from npu_zoo.engine.block_manager import KVManager
from npu_zoo.engine.sequence import Sequence
from npu_zoo.engine.speculation.layer import DraftRow
from npu_zoo.engine.speculation.proposer import DraftRequest, Proposer, StepResult


class DraftingRunner(Protocol):
    """What runs the layer.

    Attributes:
        num_steps: that it has computed.
    """

    num_steps: int

    def draft(self, step: int, rows: SequenceOf[DraftRow]) -> list[list[int]]:
        """See :meth:`npu_zoo.engine.runner.ModelRunner.draft`."""


@dataclass(frozen=True)
class _Observed:
    """A step whose tokens the layer has not seen yet.

    Attributes:
        number: of the step, as its runner counts.
        rows: by row, the sequence and the tokens behind those of the row that stand.
    """

    number: int
    rows: tuple[tuple[Sequence, tuple[int, ...]], ...]


class MtpProposer(Proposer):
    """Has the layer see every step's tokens, prompts' chunks too, and guess where guesses are asked for.

    The layer sees a step once its tokens are drawn, since a place's input is the token behind it. Where drafts are
    asked for it happens then, together with guessing; else after the next step, so that its keys and values are
    complete whenever drafting is taken up.

    The last place of a shared block was seen with the token that followed in the sequence that computed the block. It
    stays so for all who share it: one input among many differs, in a layer that only guesses.

    Args:
        kv: gives room for the places behind a sequence's last, where a second guess and further ones lie until the
            step that verifies them is seen. A sequence without room gets one draft.
    """

    def __init__(self, runner: DraftingRunner, kv: KVManager) -> None:
        self._runner, self._kv = runner, kv
        self._unseen: _Observed | None = None

    def observe(self, results: SequenceOf[StepResult]) -> None:
        """See :meth:`Proposer.observe`."""
        if self._unseen is not None:
            self._runner.draft(self._unseen.number, [DraftRow(following) for _, following in self._unseen.rows])
        rows = tuple((result.row.sequence, _following(result)) for result in results)
        self._unseen = _Observed(self._runner.num_steps, rows)

    def propose(self, requests: SequenceOf[DraftRequest]) -> list[list[int]]:
        """See :meth:`Proposer.propose`."""
        observed, self._unseen = self._unseen, None
        if observed is None:
            return [[] for _ in requests]
        wanted = {id(request.sequence): self._with_room(request) for request in requests}
        rows = [
            DraftRow(following, tuple(sequence.slots), wanted[id(sequence)])
            if id(sequence) in wanted
            else DraftRow(following)
            for sequence, following in observed.rows
        ]
        drafts = self._runner.draft(observed.number, rows)
        for request in requests:
            self._kv.shrink(request.sequence, request.sequence.num_computed_tokens)
        found = {id(sequence): own for (sequence, _), own in zip(observed.rows, drafts, strict=True)}
        return [found.get(id(request.sequence), []) for request in requests]

    def _with_room(self, request: DraftRequest) -> int:
        """How many drafts a sequence has room for: all but the first are guessed from a place of their own."""
        sequence = request.sequence
        return request.limit if self._kv.reserve(sequence, sequence.num_computed_tokens + request.limit - 1) else 1


def _following(result: StepResult) -> tuple[int, ...]:
    """The tokens behind those of a row that stand, one for each."""
    row = result.row
    first = row.start + 1
    return tuple(row.sequence.token_ids[first : first + row.num_known + result.num_accepted])
