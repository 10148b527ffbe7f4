"""What ``bench offline`` finds out, as data: the body of its record."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from npu_zoo.evaluation.floor import Floor
from npu_zoo.evaluation.offline.cases import Case
from npu_zoo.evaluation.record import Machine
from npu_zoo.evaluation.work import ModelWork, Work

Bound = Literal["latency", "memory", "output", "batch_limit", "interrupted"]
"""What ended a search."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sample(_Part):
    """One round's raw times, in seconds from when its requests were given to the engine.

    Attributes:
        first_tokens: of each request's first token.
        steps: of each step's end.
        tokens: how many output tokens each step gave.
        drafts: how often guesses of a sequence's next tokens were verified.
        draft_tokens, accepted_tokens: guesses in all, and how many of them were right.
    """

    first_tokens: tuple[float, ...]
    steps: tuple[float, ...]
    tokens: tuple[int, ...]
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_s(self) -> float:
        """Until every request has its first token."""
        return max(self.first_tokens)

    @property
    def prefill_steps(self) -> int:
        """Steps until then."""
        return self.steps.index(self.prefill_s) + 1

    @property
    def total_s(self) -> float:
        """Until every request has its last token."""
        return self.steps[-1]

    @property
    def together(self) -> bool:
        """Whether there are steps after the prefill in which every request gets a token."""
        return bool(self._full_steps())

    @property
    def non_first_token_s(self) -> float | None:
        """The mean of those steps; of all steps after the prefill where there are none; None where it is the end.

        Where drafts give a sequence several tokens in a step, each takes its share of it.
        """
        steps = self._later_steps()
        if not steps:
            return None
        tokens = max(1.0, self._given_per_step() / len(self.first_tokens))
        return statistics.fmean(self.steps[i] - self.steps[i - 1] for i in steps) / tokens

    @property
    def tokens_per_step(self) -> float:
        """Of those steps, sequences that get a token, on average: as many as the batch has where all do; 0 of none."""
        return min(self._given_per_step(), float(len(self.first_tokens)))

    def _given_per_step(self) -> float:
        steps = self._later_steps()
        return statistics.fmean(self.tokens[i] for i in steps) if steps else 0.0

    def _later_steps(self) -> list[int]:
        return self._full_steps() or list(range(self.prefill_steps, len(self.steps)))

    def _full_steps(self) -> list[int]:
        batch = len(self.first_tokens)
        return [i for i in range(self.prefill_steps, len(self.steps)) if self.tokens[i] >= batch]


class CaseResult(_Part):
    """A case's figures: medians of its rounds, each by itself.

    Attributes:
        input, output, batch: the case.
        total_s: until the last token of all.
        prefill_s: until every request has its first token.
        prefill_average_s: that by the steps it took.
        non_first_token_s: of a step after that in which every request gets a token; None where ``output`` is 1.
        together: whether there were such steps, in every round; otherwise it is the mean of all later steps.
        non_first_token_throughput: ``batch / non_first_token_s``, tokens/s, with what a step gave in place of ``batch``
            where not all were together; 0 where ``output`` is 1.
        e2e_throughput: ``batch * output / total_s``, tokens/s.
        prefill, decode: floors, for all of the batch at once; none of decode where ``output`` is 1.
        samples: the rounds.
    """

    input: int
    output: int
    batch: int
    total_s: float
    prefill_s: float
    prefill_average_s: float
    non_first_token_s: float | None
    together: bool
    non_first_token_throughput: float
    e2e_throughput: float
    prefill: Floor
    decode: Floor | None
    samples: tuple[Sample, ...]

    @property
    def case(self) -> Case:
        """What was run."""
        return Case(self.input, self.output, self.batch)

    @classmethod
    def of(cls, case: Case, samples: Sequence[Sample], work: ModelWork) -> CaseResult:
        """The figures of a case's rounds, with floors that tell no times."""
        total_s, prefill_s = _median(s.total_s for s in samples), _median(s.prefill_s for s in samples)
        token_s = _median(s.non_first_token_s or 0.0 for s in samples) if case.output > 1 else None
        return cls(
            **case._asdict(),
            total_s=total_s,
            prefill_s=prefill_s,
            prefill_average_s=_median(s.prefill_s / s.prefill_steps for s in samples),
            non_first_token_s=token_s,
            together=all(sample.together for sample in samples),
            non_first_token_throughput=_median(s.tokens_per_step for s in samples) / token_s if token_s else 0.0,
            e2e_throughput=case.batch * case.output / total_s,
            prefill=Floor.of(work.prefill([case.input] * case.batch), prefill_s, None),
            decode=_decode_floor(case, token_s, work),
            samples=tuple(samples),
        )

    def on(self, machine: Machine) -> CaseResult:
        """The same, with floors' times and shares on a machine that was measured."""
        prefill = Floor.of(Work(self.prefill.bytes, self.prefill.operations), self.prefill_s, machine)
        decode = self.decode
        if decode is not None and self.non_first_token_s is not None and self.together:
            seconds = self.non_first_token_s * (self.output - 1)
            decode = Floor.of(Work(decode.bytes, decode.operations), seconds, machine)
        return self.model_copy(update={"prefill": prefill, "decode": decode})


class NotRun(_Part):
    """A case that did not run, and why."""

    input: int
    output: int
    batch: int
    reason: str

    @property
    def case(self) -> Case:
        """What did not run."""
        return Case(self.input, self.output, self.batch)


class Search(_Part):
    """The largest batch of a pair under a latency.

    Attributes:
        under_ms: the limit of a non-first token's mean time.
        largest_batch: that held it; 0 where not even one sequence did.
        limited_by: what ended it: the ``latency``, ``memory`` for keys and values or for a step (or the engine's other
            limits), an ``output`` too short for larger batches to generate all at once, the ``batch_limit`` that was
            given, or that it was ``interrupted``.
        probes: every batch that was run, in order.
    """

    input: int
    output: int
    under_ms: float
    largest_batch: int
    limited_by: Bound
    probes: tuple[CaseResult, ...]

    @property
    def best(self) -> CaseResult | None:
        """The probe of the largest batch."""
        return next((probe for probe in self.probes if probe.batch == self.largest_batch), None)


class OfflineBody(_Part):
    """Everything that a run found out.

    Attributes:
        cases: those that ran; of a search the largest batch that held.
        complete: whether nothing was left to do, as after Ctrl-C.
    """

    cases: tuple[CaseResult, ...] = ()
    not_run: tuple[NotRun, ...] = ()
    searches: tuple[Search, ...] = ()
    complete: bool = False

    def on(self, machine: Machine) -> OfflineBody:
        """The same, with shares of a machine that was measured."""
        searches = tuple(
            search.model_copy(update={"probes": tuple(probe.on(machine) for probe in search.probes)})
            for search in self.searches
        )
        return self.model_copy(update={"cases": tuple(case.on(machine) for case in self.cases), "searches": searches})

    def figures(self) -> dict[str, float]:
        """What a matrix row would cite: averages over the cases, and batches that were found."""
        found = {f"largest_batch_{s.input}_{s.output}_under_{s.under_ms:g}_ms": s.largest_batch for s in self.searches}
        if not self.cases:
            return {name: float(value) for name, value in found.items()}
        non_first = mean(case.non_first_token_throughput for case in self.cases)
        e2e = mean(case.e2e_throughput for case in self.cases)
        return {**found, "non_first_token_tokens_per_s": non_first, "e2e_tokens_per_s": e2e}


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; there must be one value."""
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _decode_floor(case: Case, token_s: float | None, work: ModelWork) -> Floor | None:
    if token_s is None:
        return None
    steps = case.output - 1
    return Floor.of(work.decode([case.input] * case.batch, steps), token_s * steps, None)
