"""Penalties for tokens that a sequence has already, kept from step to step: a step costs its new tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from npu_zoo.core.sampling import SamplingParams

if TYPE_CHECKING:
    from npu_zoo.engine.sequence import Sequence


def has_penalties(params: SamplingParams) -> bool:
    """Whether logits depend on the tokens before."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class SeenTokens:
    """Which tokens a sequence has, and how often its output has each.

    Args:
        vocab_size: of the logits; ids beyond it are none of theirs.
        device: of the logits.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._size = vocab_size
        with torch.inference_mode(False):  # else they could not be written outside of that mode
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
            self._present = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self._taken = 0

    def update(self, sequence: Sequence) -> None:
        """Take the tokens that have come since the last call."""
        first, prompt = self._taken, sequence.num_prompt_tokens
        new = sequence.token_ids[first:]
        if not new:
            return
        self._taken = first + len(new)
        ids = self._known(new)
        self._seen[ids] = True
        output = ids if first >= prompt else self._known(new[prompt - first :])
        self._add_output(output)

    def followed_by(self, token_ids: Iterable[int]) -> SeenTokens:
        """The same with more output, such as drafts that may not stand."""
        other = SeenTokens(self._size, self._counts.device)
        for mine, theirs in zip(self._held, other._held, strict=True):
            theirs.copy_(mine)
        other._taken = self._taken
        other._add_output(other._known(list(token_ids)))
        return other

    def penalise(self, row: Tensor, params: SamplingParams) -> None:
        """Apply penalties to a sequence's [vocab_size] float32 logits, in place."""
        if params.repetition_penalty != 1.0:
            divided, multiplied = row / params.repetition_penalty, row * params.repetition_penalty
            # Above 0 the quotient counts, else the product: with a penalty above 1 the smaller, below 1 the larger one.
            choose = torch.minimum if params.repetition_penalty > 1.0 else torch.maximum
            row.copy_(torch.where(self._seen, choose(divided, multiplied), row))
        if params.frequency_penalty or params.presence_penalty:
            row.sub_(params.frequency_penalty * self._counts + params.presence_penalty * self._present)

    @property
    def _held(self) -> tuple[Tensor, ...]:
        return self._seen, self._counts, self._present

    def _add_output(self, ids: Tensor) -> None:
        self._seen[ids] = True
        self._counts.index_add_(0, ids, self._counts.new_ones(len(ids)))
        self._present[ids] = 1.0

    def _known(self, token_ids: list[int]) -> Tensor:
        ids = [token_id for token_id in token_ids if token_id < self._size]
        return torch.tensor(ids, dtype=torch.long, device=self._counts.device)
