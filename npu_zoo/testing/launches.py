"""What a decode step launches on a simulated NPU, by kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.testing.door import unchecked_config

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

    reports: list[Any] = []
    with LLM.from_config(unchecked_config(config, enforce_eager=enforce_eager)) as llm:
        for tokens in (2, 2, 2 + STEPS):  # the first one captures
            with measure() as report:
                llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
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
