"""What a request asked about its own prompt: log-probabilities and logits, position by position."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from npu_zoo.core.engine import Logprob
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.sampler import TokenLogprobs, top_logprobs

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 256  # positions at a time, so that long prompts do not hold [tokens, vocab_size] at once


class PromptScores:
    """Grows with the prompt's computation; what is computed again, after preemption or an interruption, is not added.

    Attributes:
        next: the next position that is to be told of. Its token is predicted by the one before.
        logprobs: per position of the prompt up to that, None for those that nobody asked for and the first.
    """

    def __init__(self, params: SamplingParams, num_prompt_tokens: int) -> None:
        self.next = max(1, min(params.prompt_logprobs_start, num_prompt_tokens))
        self.logprobs: list[dict[int, Logprob] | None] = [None] * self.next
        self._top = params.prompt_logprobs or 0
        self._wants_logits = params.prompt_logits
        self._end = num_prompt_tokens + params.prompt_logits
        self._logits: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether everything is told."""
        return self.next >= self._end

    def wants(self, start: int, num_tokens: int) -> bool:
        """Whether a step of so many tokens from a position on predicts something that is still to be told."""
        return self.next <= min(start + num_tokens, self._end - 1)

    def add(
        self,
        hidden: Tensor,
        start: int,
        token_ids: list[int],
        compute_logits: Callable[[Tensor], Tensor],
        describe: Callable[[TokenLogprobs], dict[int, Logprob]],
    ) -> None:
        """Take what a step computed of the prompt.

        Args:
            hidden: [tokens, hidden_size], of the step's tokens.
            start: the first one's position.
            token_ids: of the whole sequence.
            compute_logits: [N, hidden_size] to [N, vocab_size].
            describe: makes an entry of a token's log-probability.
        """
        num_prompt_tokens = self._end - self._wants_logits
        last = min(start + len(hidden), self._end - 1)
        while self.next <= last:
            count = min(_ROWS, last + 1 - self.next)
            first = self.next - 1 - start
            logits = compute_logits(hidden[first : first + count])
            if self._wants_logits:
                self._logits.append(logits.float().cpu())
            targets = token_ids[self.next : min(self.next + count, num_prompt_tokens)]
            if targets:
                entries = top_logprobs(logits[: len(targets)], targets, [self._top] * len(targets))
                self.logprobs.extend(describe(entry) for entry in entries)
            self.next += count

    def logits(self) -> Any:
        """A float32 array of [positions, vocab_size]; None where nobody asked for it, or not all is there."""
        if not self._wants_logits or not self.complete:
            return None
        import torch

        return torch.cat(self._logits).numpy()
