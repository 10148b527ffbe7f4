"""How far two engines agree on the same prompts: scored texts and greedy tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.sampling import SamplingParams

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM

SCORED = SamplingParams(temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=0)


@dataclass(frozen=True)
class Agreement:
    """How far two runs agree.

    Attributes:
        tokens: prompt tokens that were scored, and tokens that were generated.
        worst_logprob: the largest difference of a scored token's natural-log probability.
        equal_tokens: generated tokens that are the same, up to the first difference of each prompt.
        worst_gap: where tokens differ first, how far apart the reference's two best were; 0 where none differs.
        mean_logprob: the mean difference of the scored tokens' natural-log probabilities.
    """

    tokens: int
    worst_logprob: float
    equal_tokens: int
    worst_gap: float
    mean_logprob: float = 0.0

    def within(self, bound: float) -> bool:
        """Whether scores and the ties that tokens differ at are all below a bound."""
        return self.worst_logprob < bound and self.worst_gap < bound


def compare(reference: Sequence[RequestOutput], found: Sequence[RequestOutput]) -> Agreement:
    """Compare what two engines made of the same prompts, both with :data:`SCORED`."""
    scored, worst, total, equal, gap, generated = 0, 0.0, 0.0, 0, 0.0, 0
    for expected, output in zip(reference, found, strict=True):
        pairs = list(zip(_scores(expected), _scores(output), strict=True))
        scored += len(pairs)
        worst = largest([worst, *(abs(a - b) for a, b in pairs)])
        total += sum(abs(a - b) for a, b in pairs)
        tokens, others = expected.outputs[0].token_ids, output.outputs[0].token_ids
        generated += len(tokens)
        first = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), None)
        equal += len(tokens) if first is None else first
        if first is not None:
            gap = largest([gap, _gap(expected, first)])
    return Agreement(scored + generated, worst, equal, gap, total / max(scored, 1))


def largest(values: Iterable[float]) -> float:
    """The largest; what is no number counts as larger than all, where max() may pass over it."""
    return max(values, key=lambda value: (math.isnan(value), value))


def agree(reference: LLM, other: LLM, prompts: Sequence[Sequence[int]]) -> Agreement:
    """Run the same prompts on two engines, in one batch each, and compare."""
    given = [list(prompt) for prompt in prompts]
    return compare(reference.generate(given, SCORED), other.generate(given, SCORED))


def _scores(output: RequestOutput) -> list[float]:
    return [next(iter(entry.values())).logprob for entry in output.prompt_logprobs or [] if entry]


def _gap(output: RequestOutput, place: int) -> float:
    logprobs = output.outputs[0].logprobs or []
    best = sorted((entry.logprob for entry in logprobs[place].values()), reverse=True)
    return best[0] - best[1]
