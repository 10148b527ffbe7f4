"""Runs cases, or searches for batches, on an engine, and keeps what has come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from npu_zoo.core.engine import Engine
from npu_zoo.evaluation.offline.cases import WARM_UP_TOKENS, Case
from npu_zoo.evaluation.offline.results import Bound, CaseResult, NotRun, OfflineBody, Sample, Search
from npu_zoo.evaluation.offline.room import Room
from npu_zoo.evaluation.offline.samples import (
    CaseError,
    MemoryExhaustedError,
    PreemptedError,
    RandomPrompts,
    ordinary_ids,
    run_batch,
)
from npu_zoo.evaluation.offline.search import largest_batch
from npu_zoo.evaluation.work import ModelWork


class Listener(Protocol):
    """Hears how a benchmark gets on. An exception, such as KeyboardInterrupt, ends it."""

    def begin(self, case: Case, number: int, output: int) -> None:
        """A run of a case begins, with so many output tokens; number 0 is the warm-up, and rounds count from 1."""

    def step(self, first_tokens: int, tokens: int) -> None:
        """A step gave so many requests their first token, and so many tokens in all."""

    def finished(self, result: CaseResult) -> None:
        """A case has run."""

    def refused(self, case: NotRun) -> None:
        """A case did not run."""


class OfflineBenchmark:
    """An engine's batches, which is its own meanwhile.

    Attributes:
        body: what there is so far.

    Args:
        rounds: measured runs of each case.
        seed: of the prompts.
        on_change: called with the body whenever something was added to it.
        body: what there is before.
    """

    def __init__(
        self,
        engine: Engine,
        rounds: int,
        seed: int,
        listener: Listener,
        on_change: Callable[[OfflineBody], None] = lambda body: None,
        body: OfflineBody | None = None,
    ) -> None:
        self.body = body or OfflineBody()
        self._engine, self._rounds, self._listener, self._on_change = engine, rounds, listener, on_change
        self._room = Room.of(engine)
        self._prompts = RandomPrompts(ordinary_ids(engine.config), seed)
        self._work = ModelWork.of(engine.config)

    def run(self, cases: Iterable[Case]) -> None:
        """Run cases; those that cannot be are kept with the reason."""
        for case in cases:
            reason = self._room.refusal(case)
            if reason is not None:
                self.refuse(case, reason)
                continue
            try:
                result = self._measure(case)
            except CaseError as error:
                self.refuse(case, str(error))
            else:
                self._keep(cases=(*self.body.cases, result))

    def search(self, pairs: Iterable[Case], under_ms: float, batch_limit: int) -> None:
        """Find each pair's largest batch whose non-first tokens take less than ``under_ms`` on average.

        Args:
            pairs: cases whose batch does not matter.
            batch_limit: the largest batch to try.
        """
        for pair in pairs:
            room = self._room.largest_batch(pair.length)
            reason = self._room.refusal(pair._replace(batch=1))
            if pair.output < 2:
                reason = "one output token leaves no later one, whose time is searched by; give 2 or more"
            if reason is not None:
                self.refuse(pair._replace(batch=1), reason)
                continue
            try:
                self._search(pair, under_ms, min(room, batch_limit), "memory" if room < batch_limit else "batch_limit")
            except CaseError as error:
                self.refuse(pair._replace(batch=1), str(error))

    def refuse(self, case: Case, reason: str) -> None:
        """Keep a case as one that does not run."""
        refused = NotRun(**case._asdict(), reason=reason)
        self._listener.refused(refused)
        self._keep(not_run=(*self.body.not_run, refused))

    def _search(self, pair: Case, under_ms: float, most: int, bound: Bound) -> None:
        probes = _Probes(pair, under_ms, self._measure)
        try:
            largest = largest_batch(probes.holds, most)
        except BaseException:
            if probes.results:
                self._keep_search(probes.search(probes.largest_held, "interrupted"))
            raise
        if largest < most:
            bound = probes.unfit.get(largest + 1, "latency")
        self._keep_search(probes.search(largest, bound))

    def _keep_search(self, search: Search) -> None:
        cases = (*self.body.cases, search.best) if search.best is not None else self.body.cases
        self._keep(searches=(*self.body.searches, search), cases=cases)

    def _measure(self, case: Case) -> CaseResult:
        self._round(case, 0, min(case.output, WARM_UP_TOKENS))
        samples = [self._round(case, number, case.output) for number in range(1, self._rounds + 1)]
        result = CaseResult.of(case, samples, self._work)
        self._listener.finished(result)
        return result

    def _round(self, case: Case, number: int, output: int) -> Sample:
        prompts = self._prompts.draw(case, number)
        self._listener.begin(case, number, output)
        return run_batch(self._engine, prompts, output, self._listener.step)

    def _keep(self, **changes: Sequence[object]) -> None:
        self.body = self.body.model_copy(update=changes)
        self._on_change(self.body)


class _Probes:
    """Batches of one pair, each run once.

    Attributes:
        results: of those that ran.
        unfit: those that are not of all sequences at once, and why.
    """

    def __init__(self, pair: Case, under_ms: float, measure: Callable[[Case], CaseResult]) -> None:
        self.results: list[CaseResult] = []
        self.unfit: dict[int, Bound] = {}
        self._pair, self._under_ms, self._measure = pair, under_ms, measure

    def holds(self, batch: int) -> bool:
        """Run one; whether it is under the limit."""
        try:
            self.results.append(self._measure(self._pair._replace(batch=batch)))
        except (MemoryExhaustedError, PreemptedError):
            self.unfit[batch] = "memory"
            return False
        if not self.results[-1].together:
            self.unfit[batch] = "output"
        return self._is_under(self.results[-1])

    @property
    def largest_held(self) -> int:
        """The largest that was run and is under the limit; 0 where none is."""
        return max((result.batch for result in self.results if self._is_under(result)), default=0)

    def search(self, largest: int, limited_by: Bound) -> Search:
        """What came of it."""
        return Search(
            input=self._pair.input,
            output=self._pair.output,
            under_ms=self._under_ms,
            largest_batch=largest,
            limited_by=limited_by,
            probes=tuple(self.results),
        )

    def _is_under(self, result: CaseResult) -> bool:
        token_s = result.non_first_token_s
        return result.together and token_s is not None and token_s * 1000 < self._under_ms
