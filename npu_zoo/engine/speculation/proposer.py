"""The interface of what guesses next tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from npu_zoo.engine.scheduler import ScheduledRow
from npu_zoo.engine.sequence import Sequence


@dataclass(frozen=True)
class DraftRequest:
    """A sequence that the next step could verify drafts of; its last token alone is not computed yet.

    Attributes:
        limit: most drafts that are of use, 1 at least.
    """

    sequence: Sequence
    limit: int


@dataclass(frozen=True)
class StepResult:
    """What became of one row of a step, of a prompt's chunks too.

    Attributes:
        row: as it was computed. Its hidden states are the step's, row by row, ``row.num_tokens`` each.
        new_tokens: what the sequence was given, in order; empty where the row does not sample. The first
            ``len(new_tokens) - 1`` of ``row.drafts`` are accepted: keys and values of the row's first
            ``row.num_known + len(new_tokens) - 1`` tokens are right, and the last new token is not computed yet.
    """

    row: ScheduledRow
    new_tokens: tuple[int, ...]

    @property
    def num_accepted(self) -> int:
        """Drafts that were right; fewer are told of where the sequence ended before."""
        return max(0, len(self.new_tokens) - 1)


class Proposer(ABC):
    """Guesses next tokens. A draft may be anything: it costs time where it is wrong, and changes no output.

    A step calls :meth:`propose` before it is scheduled, unless drafting is turned off or no sequence can use a draft,
    and :meth:`observe` after it has sampled, always. Both are on the first rank; a proposer that computes with the
    model keeps what it needs of a step on the runner of each rank, and commands all of them. What a proposer keeps of a
    sequence lives as long as the sequence does (a ``WeakKeyDictionary``); one that was preempted comes back with
    its prompt and output as a prompt, its keys and values computed anew.
    """

    @abstractmethod
    def propose(self, requests: SequenceOf[DraftRequest]) -> list[list[int]]:
        """Drafts of the tokens that follow ``sequence.token_ids``, for each request, up to its limit; may be none."""

    def observe(self, results: SequenceOf[StepResult]) -> None:  # noqa: B027
        """A step's rows, in the order in which they were computed, and what the sequences were given."""
