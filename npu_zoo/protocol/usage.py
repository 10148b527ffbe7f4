"""How many tokens a request took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npu_zoo.core.engine import CompletionOutput, RequestOutput
from npu_zoo.engine.prompting import PromptEncoder


class UsageCounter:
    """Counts as OpenAI's API does: a prompt once, however many answers it has.

    Reasoning tokens are counted where the marker that ends the reasoning is one token.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        self._end_of_reasoning = _end_of_reasoning(encoder)

    def count(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The usage of one request's states so far; those of a list of prompts are added up."""
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        completion = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(output.metrics.cached_tokens for output in outputs)},
        }
        if self._end_of_reasoning is not None:
            reasoning = sum(self._reasoning(output, answer) for output in outputs for answer in output.outputs)
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage

    def _reasoning(self, output: RequestOutput, answer: CompletionOutput) -> int:
        if self._end_of_reasoning in answer.token_ids:
            return answer.token_ids.index(self._end_of_reasoning) + 1
        return len(answer.token_ids) if output.reasoning_open else 0


def _end_of_reasoning(encoder: PromptEncoder) -> int | None:
    reasoning, tokenizer = encoder.config.reasoning, encoder.tokenizer
    if reasoning is None or tokenizer is None:
        return None
    ids = tokenizer.encode(reasoning.end, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None
