"""Which drafts stand: a draft is right where it is the token that plain decoding would have drawn there.

Every draw depends on seed, completion and position alone, so the token at a position is known once its logits are: the
text is plain decoding's, token by token. This is rejection sampling (arXiv:2211.17192) for a draft that is certain of
its token x: it is accepted with probability p(x), for the draw from p is x with that probability; and otherwise the
draw is one from p given that it is not x, the normalised residual max(0, p - q) that a rejection has to draw from.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.penalties import SeenTokens
from npu_zoo.engine.scheduler import ScheduledRow
from npu_zoo.engine.sequence import Sequence

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DraftPosition:
    """A sequence as it would be if its first drafts were its output, for the sampler."""

    sequence: Sequence
    drafts: tuple[int, ...]

    guided = False  # what has to keep a form is given no drafts
    guide = None

    @property
    def params(self) -> SamplingParams:
        """See :class:`Sequence`."""
        return self.sequence.params

    @property
    def seed(self) -> int:
        """See :class:`Sequence`."""
        return self.sequence.seed

    @property
    def index(self) -> int:
        """See :class:`Sequence`."""
        return self.sequence.index

    @property
    def num_output_tokens(self) -> int:
        """With the drafts."""
        return self.sequence.num_output_tokens + len(self.drafts)

    def seen_tokens(self, vocab_size: int, device: torch.device) -> SeenTokens:
        """With the drafts."""
        return self.sequence.seen_tokens(vocab_size, device).followed_by(self.drafts)


def positions(row: ScheduledRow) -> list[Sequence | DraftPosition]:
    """Whose next tokens a row's logits give: the sequence's own, then those after each of its drafts."""
    drafted = (DraftPosition(row.sequence, row.drafts[: count + 1]) for count in range(len(row.drafts)))
    return [row.sequence, *drafted]


def count_kept(drafts: SequenceOf[int], drawn: SequenceOf[int]) -> int:
    """How many of a row's drawn tokens stand: those up to the first that is not its draft, that one too."""
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == drawn[accepted]:
        accepted += 1
    return accepted + 1
