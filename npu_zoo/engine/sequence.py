"""The state of one completion while it runs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from npu_zoo.core.engine import CompletionOutput, FinishReason, RequestMetrics
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.block_table import BlockTable
from npu_zoo.engine.penalties import SeenTokens

if TYPE_CHECKING:
    import torch

    from npu_zoo.engine.detokenizer import IncrementalDetokenizer
    from npu_zoo.engine.guidance import Guide
    from npu_zoo.engine.prompt_scores import PromptScores

_numbers = itertools.count()


@dataclass(eq=False)
class Sequence:
    """One completion of a request.

    Attributes:
        token_ids: prompt and output.
        num_computed_tokens: tokens whose keys and values are in the cache.
        slots: the blocks (or the one contiguous slot) that hold them; owned by the KV manager.
        replica: of the attention, whose cache has the room; chosen by the KV manager.
        digests: of the full blocks of ``token_ids``, as far as they were needed; owned by the KV manager.
        seed: of this completion's draws.
        priority: lower ones are admitted first and give their room up last.
        output: what the user sees of it.
        guide: leads it along the form that its output has to have.
        form_start: tokens before that form, which are prompt and reasoning; None while the reasoning goes on.
        prompt_scores: what was asked about the prompt; None where nothing was.
        seen: what penalties are made of; None until they are asked for.
    """

    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    seed: int
    output: CompletionOutput
    detokenizer: IncrementalDetokenizer | None = None
    guide: Guide | None = None
    form_start: int | None = None
    priority: int = 0
    number: int = field(default_factory=lambda: next(_numbers))
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    preemptions: int = 0
    slots: BlockTable = field(default_factory=BlockTable)
    replica: int = 0
    digests: list[bytes] = field(default_factory=list)
    prompt_scores: PromptScores | None = None
    seen: SeenTokens | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among all sequences: by priority, then by arrival."""
        return self.priority, self.number

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """Output tokens, as a copy."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def guided(self) -> bool:
        """Whether its next token has to keep a form."""
        return self.guide is not None and self.form_start is not None

    @property
    def finished(self) -> bool:
        """Whether it has a finish reason."""
        return self.output.finish_reason is not None

    @property
    def num_shareable_tokens(self) -> int:
        """Tokens whose keys and values may come from the prefix cache: the others' hidden states are needed."""
        scores = self.prompt_scores
        return self.num_tokens - 1 if scores is None or scores.complete else scores.next - 1

    def seen_tokens(self, vocab_size: int, device: torch.device) -> SeenTokens:
        """What penalties are made of, for logits of a size and on a device."""
        if self.seen is None:
            self.seen = SeenTokens(vocab_size, device)
        self.seen.update(self)
        return self.seen

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End it."""
        self.output.finish_reason = reason
        self.output.stop_reason = stop_reason


@dataclass(eq=False)
class Request:
    """A prompt with all of its completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sequences: list[Sequence]
    metrics: RequestMetrics
    reasoning_open: bool = False

    @property
    def number(self) -> int:
        """Its own among all requests: that of its first sequence."""
        return self.sequences[0].number

    @property
    def finished(self) -> bool:
        """Whether all completions are."""
        return all(sequence.finished for sequence in self.sequences)
