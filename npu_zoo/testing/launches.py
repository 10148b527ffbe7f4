"""What a decode step launches on a simulated NPU, by kernel; with drafts too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npu_zoo.core.config import EngineConfig, SpeculationConfig, SpeculativeMethod
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.testing.door import unchecked_config

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM

STEPS = 8
Measure = Callable[[], AbstractContextManager[Any]]
"""The simulator's ``measure``: counts what happens inside of it."""

REASONS: dict[str, str] = {
    "aclnnAdd": "routed and shared experts added up",
    "aclnnAddRmsNorm": "a norm with the addition to the residual stream",
    "aclnnApplyRotaryPosEmbV2": "queries and keys turned by position",
    "aclnnArgMax": "the choice of the token",
    "aclnnEmbedding": "the tokens' rows of the embedding",
    "aclnnFusedInferAttentionScoreV3": "attention over the paged cache",
    "aclnnFusedInferAttentionScoreV4": "attention over the latents in the cache",
    "aclnnGroupedMatmulV5": "query, key and value projections, each contiguous; or a product with all experts",
    "aclnnIndex": "the last token's hidden state of each row",
    "aclnnIndexSelect": "cosines and sines of the positions",
    "aclnnInplaceCopy": "slices made contiguous, or router inputs in float32",
    "aclnnInterleaveRope": "rotary parts of queries turned by position",
    "aclnnKvRmsNormRopeCache": "latents normed, their keys turned, both written into the cache",
    "aclnnMatmul": "a product with a weight",
    "aclnnMatmulWeightNz": "a product with a weight in FRACTAL_NZ",
    "aclnnMoeGatingTopK": "the choice of experts",
    "aclnnMoeInitRoutingV3": "rows sorted by expert",
    "aclnnMoeTokenUnpermute": "each token's rows added up by weight",
    "aclnnRmsNorm": "a norm without residual: the first of all, and of latents",
    "aclnnScatterPaKvCache": "keys and values written into the cache",
    "aclnnSwiGlu": "the activation of a feed-forward",
    "aclnnTransposeBatchMatMul": "queries absorbed, attended latents projected, by head",
    "atb:PagedAttention": "attention over the paged cache",
    "atb:ReshapeAndCache": "keys and values written into the cache",
}
"""What each kernel is launched for."""


@dataclass(frozen=True)
class StepLaunches:
    """One decode step.

    Attributes:
        launches: operators that the host launches, by kernel, the most frequent first.
        replays: launches of whole graphs.
        copies_back: copies from the device to the host.
        synchronisations: times that the host waits for the device.
    """

    launches: dict[str, int]
    replays: int
    copies_back: int
    synchronisations: int

    @property
    def total(self) -> int:
        """Operators and graphs that the host launches."""
        return sum(self.launches.values()) + self.replays


def decode_launches(
    config: EngineConfig, prompts: list[list[int]], measure: Measure, *, enforce_eager: bool
) -> StepLaunches:
    """Run a config on the simulated device; the difference of a longer run is what its further steps took.

    Args:
        config: for an NPU that this process simulates.
        prompts: one sequence each.
        enforce_eager: every operator by itself, instead of a captured graph.
    """
    from npu_zoo.engine.llm import LLM

    with LLM.from_config(unchecked_config(config, enforce_eager=enforce_eager)) as llm:
        return _step(llm, prompts, measure, tokens=1)


def drafted_launches(
    config: EngineConfig, prompts: list[list[int]], measure: Measure, *, enforce_eager: bool, drafts: int
) -> StepLaunches:
    """The same of a step in which every sequence has some drafts, all of them right: it gives one token more each.

    A wrong draft is computed like a right one, so the launches are those of any step with as many.
    """
    from npu_zoo.engine.llm import LLM
    from npu_zoo.testing.speculation import KnownTexts, draft_from

    speculation = SpeculationConfig("prompt_lookup", drafts, adaptive=False)
    changed = unchecked_config(config, enforce_eager=enforce_eager, speculation=speculation)
    with LLM.from_config(changed) as llm:
        draft_from(llm, KnownTexts([]))
        outputs = llm.generate(prompts, _params(1 + (1 + STEPS) * (1 + drafts)))
        draft_from(llm, KnownTexts([output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]))
        return _step(llm, prompts, measure, tokens=1 + drafts)


@dataclass(frozen=True)
class TextLaunches:
    """A text after its first token.

    Attributes:
        launches: operators and graphs that the host launches.
        tokens: that they gave.
        draft_tokens, accepted_tokens: guesses that were verified, and how many of them were right.
    """

    launches: int
    tokens: int
    draft_tokens: int
    accepted_tokens: int

    @property
    def per_token(self) -> float:
        """Launches for each token."""
        return self.launches / self.tokens


def text_launches(
    config: EngineConfig,
    prompt: str,
    count: int,
    measure: Measure,
    *,
    enforce_eager: bool,
    drafts: int,
    method: SpeculativeMethod = "prompt_lookup",
) -> TextLaunches:
    """Write a text of so many tokens, with drafts by a method or, where they are 0, without."""
    from npu_zoo.engine.llm import LLM

    speculation = SpeculationConfig(method, drafts, adaptive=False) if drafts else None
    reports: list[Any] = []
    with LLM.from_config(unchecked_config(config, enforce_eager=enforce_eager, speculation=speculation)) as llm:
        for tokens in (count, 1, count):  # the first one captures
            with measure() as report:
                (output,) = llm.generate(prompt, _params(tokens))
            reports.append(report)
    launches = [report.num_launches + report.replays for report in reports]
    metrics = output.metrics
    return TextLaunches(launches[2] - launches[1], count - 1, metrics.draft_tokens, metrics.accepted_tokens)


def _params(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def _step(llm: LLM, prompts: list[list[int]], measure: Measure, *, tokens: int) -> StepLaunches:
    """A step that gives each sequence so many tokens."""
    reports: list[Any] = []
    for steps in (1, 1, 1 + STEPS):  # the first one captures
        with measure() as report:
            llm.generate(prompts, _params(1 + steps * tokens))
        reports.append(report)
    _, few, many = reports
    counts = {name: (count - few.launches.get(name, 0)) // STEPS for name, count in many.launches.items()}
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return StepLaunches(
        launches={name: count for name, count in ordered if count},
        replays=(many.replays - few.replays) // STEPS,
        copies_back=(many.copies["device_to_host"][0] - few.copies["device_to_host"][0]) // STEPS,
        synchronisations=(many.synchronisations - few.synchronisations) // STEPS,
    )
