"""Drafts by the checkpoint's own layer for further tokens: what it is told of each step, and how far it may guess."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from npu_zoo.engine.block_manager import KVManager
from npu_zoo.engine.sequence import Sequence
from npu_zoo.engine.speculation.proposer import DraftRequest, Proposer, StepResult
from npu_zoo.engine.speculation.steps import STEPS_AT_ONCE, DraftRow, SeenStep


class DraftingRunner(Protocol):
    """What runs the layer.

    Attributes:
        num_steps: that it has computed.
    """

    num_steps: int

    def draft(self, steps: SequenceOf[SeenStep]) -> list[list[int]]:
        """See :meth:`npu_zoo.engine.runner.ModelRunner.draft`."""


@dataclass(frozen=True)
class _Observed:
    """A step whose tokens the layer has not seen yet.

    Attributes:
        number: of the step, as its runner counts.
        sequences: of its rows.
        following: by row, the tokens behind those that stand.
    """

    number: int
    sequences: tuple[Sequence, ...]
    following: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the layer is to see."""
        return sum(map(len, self.following))

    @property
    def step(self) -> SeenStep:
        """As the layer takes it, without guesses."""
        return SeenStep(self.number, tuple(map(DraftRow, self.following)))


class MtpProposer(Proposer):
    """Has the layer see every step's tokens, prompts' chunks too, and guess where guesses are asked for.

    The layer sees a step once its tokens are drawn, since a place's input is the token behind it: together with
    guessing where drafts are asked for, and else with the steps that follow, a few at once. So its keys and values are
    complete whenever drafting is taken up, and cost little as long as it rests.

    The last place of a shared block was seen with the token that followed in the sequence that computed the block. It
    stays so for all who share it: one input among many differs, in a layer that only guesses.

    Args:
        kv: gives room for the places behind a sequence's last, where a second guess and further ones lie until the
            step that verifies them is seen. A sequence without room gets one draft.
        max_tokens: that the layer may see at once beside the last step's.
    """

    def __init__(self, runner: DraftingRunner, kv: KVManager, max_tokens: int) -> None:
        self._runner, self._kv, self._max_tokens = runner, kv, max_tokens
        self._unseen: list[_Observed] = []

    def observe(self, results: SequenceOf[StepResult]) -> None:
        """See :meth:`Proposer.observe`."""
        sequences = tuple(result.row.sequence for result in results)
        self._unseen.append(_Observed(self._runner.num_steps, sequences, tuple(map(_following, results))))
        if len(self._unseen) > 1 and self._is_much():
            self._runner.draft([observed.step for observed in self._unseen[:-1]])
            del self._unseen[:-1]

    def propose(self, requests: SequenceOf[DraftRequest]) -> list[list[int]]:
        """See :meth:`Proposer.propose`."""
        if not self._unseen:
            return [[] for _ in requests]
        *earlier, last = self._unseen
        rooms = {id(request.sequence): self._room(request) for request in requests}
        wanted = {id(r.sequence): (tuple(r.sequence.slots), rooms[id(r.sequence)]) for r in requests}
        self._unseen = []
        rows = [
            DraftRow(following, *wanted.get(id(sequence), ((), 0)))
            for sequence, following in zip(last.sequences, last.following, strict=True)
        ]
        drafts = self._runner.draft([*(observed.step for observed in earlier), SeenStep(last.number, tuple(rows))])
        for request in requests:
            self._kv.shrink(request.sequence, request.sequence.num_computed_tokens)
        found = {id(sequence): own for sequence, own in zip(last.sequences, drafts, strict=True)}
        return [found.get(id(request.sequence), []) for request in requests]

    def _is_much(self) -> bool:
        """Whether what was not seen has to be: runners keep no more, and a pass is to be no larger than a step."""
        tokens = sum(observed.num_tokens for observed in self._unseen)
        return len(self._unseen) >= STEPS_AT_ONCE or tokens > self._max_tokens

    def _room(self, request: DraftRequest) -> int:
        """How many drafts a sequence has room for: all but the first are guessed from a place of their own."""
        sequence = request.sequence
        return request.limit if self._kv.reserve(sequence, sequence.num_computed_tokens + request.limit - 1) else 1


def _following(result: StepResult) -> tuple[int, ...]:
    """The tokens behind those of a row that stand, one for each."""
    row = result.row
    first = row.start + 1
    return tuple(row.sequence.token_ids[first : first + row.num_known + result.num_accepted])
