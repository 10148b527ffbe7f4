"""Puts drafts into an engine's steps: asks for them, counts what became of them, stops where they do not pay."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

from npu_zoo.core.config import EngineConfig, SpeculationConfig
from npu_zoo.engine.block_manager import KVManager
from npu_zoo.engine.runner import ModelRunner
from npu_zoo.engine.sequence import Sequence
from npu_zoo.engine.speculation.control import SpeculationControl, batch_class
from npu_zoo.engine.speculation.mtp import MtpProposer
from npu_zoo.engine.speculation.prompt_lookup import PromptLookupProposer
from npu_zoo.engine.speculation.proposer import DraftRequest, Proposer, StepResult
from npu_zoo.platforms.detection import is_simulated

_LOGGER = logging.getLogger("npu_zoo.engine")


class Speculator:
    """What an engine knows of speculative decoding.

    Args:
        proposer: makes the drafts.
        config: how many, and of which method.
        control: decides where they pay.
        clock: in seconds.

    Attributes:
        num_drafts, num_draft_tokens, num_accepted_tokens: see :class:`~npu_zoo.core.engine.EngineStats`.
    """

    def __init__(
        self,
        proposer: Proposer,
        config: SpeculationConfig,
        control: SpeculationControl,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self._proposer, self._config, self._control, self._clock = proposer, config, control, clock
        self._start = 0.0
        self._told: set[int] = set()

    def begin_step(self, running: SequenceOf[Sequence]) -> dict[int, list[int]]:
        """Drafts for the next step, by the number of the sequence."""
        self._start = self._clock()
        decoding = [sequence for sequence in running if sequence.num_tokens - sequence.num_computed_tokens == 1]
        if not decoding or not self._control.wants_drafts(len(decoding)):
            return {}
        requests = [DraftRequest(s, limit) for s in decoding if (limit := self._limit(s)) > 0]
        drafts = self._proposer.propose(requests) if requests else []
        return {
            request.sequence.number: own[: request.limit] for request, own in zip(requests, drafts, strict=True) if own
        }

    def end_step(self, results: SequenceOf[StepResult]) -> None:
        """What the step's rows came to."""
        self._proposer.observe(results)
        drafted = [result for result in results if result.row.drafts]
        drafts = sum(len(result.row.drafts) for result in drafted)
        self.num_drafts += len(drafted)
        self.num_draft_tokens += drafts
        self.num_accepted_tokens += sum(result.num_accepted for result in drafted)
        if results and all(result.row.num_known == 1 and result.new_tokens for result in results):
            tokens = sum(len(result.new_tokens) for result in results)
            gain = self._control.record(len(results), drafts, tokens, self._clock() - self._start)
            if gain is not None:
                self._tell(len(results), gain)

    def explain(self) -> dict[str, Any]:
        """How it stands, as plain data."""
        return {
            "method": self._config.method,
            "num_speculative_tokens": self._config.num_tokens,
            "drafts": self.num_drafts,
            "draft_tokens": self.num_draft_tokens,
            "accepted_tokens": self.num_accepted_tokens,
            "gain_by_batch": {str(size): gain for size, gain in self._control.gains.items()},
            "turned_off_for_batches": self._control.turned_off,
        }

    def _limit(self, sequence: Sequence) -> int:
        """Most drafts that are of use: one more token comes without, and a form's masks are known one by one."""
        if sequence.guide is not None or not sequence.num_output_tokens:
            return 0
        return min(self._config.num_tokens, sequence.max_tokens - sequence.num_output_tokens - 1)

    def _tell(self, batch: int, gain: float) -> None:
        """Say once for each class of batches that drafting stops."""
        size = batch_class(batch)
        if size not in self._told:
            self._told.add(size)
            _LOGGER.warning(
                "speculative decoding (%s) is turned off for batches of %s: %.2f times the tokens a second without it; "
                "it is tried again now and then",
                self._config.method,
                f"{size // 2 + 1} to {size}" if size > 2 else size,
                gain,
            )


def create_speculator(config: EngineConfig, runner: ModelRunner, kv: KVManager) -> Speculator | None:
    """What a config asks for; None where nothing is to be guessed.

    Args:
        runner, kv: for methods that draft with the model.
    """
    speculation = config.speculation
    if speculation is None:
        return None
    proposer: Proposer = PromptLookupProposer(speculation.lookup_min, speculation.lookup_max)
    if speculation.method == "mtp":
        proposer = MtpProposer(runner, kv, config.max_num_batched_tokens)
    adaptive = speculation.adaptive and not is_simulated(config.device)
    return Speculator(proposer, speculation, SpeculationControl(adaptive=adaptive))
