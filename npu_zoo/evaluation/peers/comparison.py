"""Runs cases on all engines in turn, so that a drift of the machine favours none of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from npu_zoo.evaluation.peers.cases import Case
from npu_zoo.evaluation.peers.engines import SUBJECT, InstalledEngine
from npu_zoo.evaluation.peers.process import PeerError, PeerProcess, RunRefused
from npu_zoo.evaluation.peers.result import Agreement, CaseResult
from npu_zoo.evaluation.peers.worker.driver import LoadOptions, Request
from npu_zoo.evaluation.peers.worker.timeline import Run

KV_SLACK_TOKENS = 128
"""Room for each sequence's last, partly filled block, whatever the block size."""


class Step(NamedTuple):
    """What was just done, how many runs are over, and how many there are."""

    text: str
    done: int
    total: int


@dataclass(frozen=True)
class Conditions:
    """What holds for all engines.

    Attributes:
        rounds: of every case; each engine runs once a round.
        num_tokens: prompts hold ids below it.
        threads, cores: see :class:`~npu_zoo.evaluation.peers.process.PeerProcess`.
        cache_per_token: bytes of a token's keys and values, which a process whose memory is measured gets room by.
        fewer: rounds of an engine in a case, by both names, where ``rounds`` would take too long.
    """

    rounds: int
    num_tokens: int
    threads: int | None = None
    cores: tuple[int, ...] = ()
    cache_per_token: int = 0
    fewer: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def rounds_of(self, engine: str, case: Case) -> int:
        """How often an engine runs a case."""
        if case.metric == "cache":
            return 1
        return min(self.rounds, self.fewer.get((engine, case.name), self.rounds))


class Comparison:
    """The engines of one run, a loaded process each.

    Args:
        engines: the first is the one that the others are compared with.
        options: how each is started, by name.
        on_step: hears of every run.
    """

    def __init__(
        self,
        engines: Sequence[InstalledEngine],
        options: Mapping[str, LoadOptions],
        conditions: Conditions,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> None:
        self.engines = {engine.name: engine for engine in engines}
        self.options = options
        self.conditions = conditions
        self._on_step = on_step
        self._loaded: dict[str, PeerProcess] = {}
        self._unloadable: dict[str, str] = {}
        self._done = self._total = 0

    def run(self, cases: Sequence[Case]) -> Generator[CaseResult, None, None]:
        """Each case's result once it is over; those in fresh processes come first, while nothing else is loaded."""
        ordered = sorted(cases, key=lambda case: not case.fresh)
        self._done, self._total = 0, sum(map(self._runs, ordered))
        with ExitStack() as stack:
            stack.callback(self._close)
            for case in ordered:
                yield self._fresh_case(case) if case.fresh else self._loaded_case(case)

    def _runs(self, case: Case) -> int:
        rounds = [self.conditions.rounds_of(name, case) for name in self.engines]
        if case.fresh:
            return sum(rounds) * (2 if case.metric == "start" else 1)
        return sum(rounds) + len(rounds)

    def _close(self) -> None:
        while self._loaded:
            self._loaded.popitem()[1].close(gently=False)

    def _order(self, number: int, case: Case) -> list[str]:
        """Who takes part in a round of a case; who runs first changes from round to round."""
        names = list(self.engines)
        first = number % len(names)
        return [name for name in names[first:] + names[:first] if number < self.conditions.rounds_of(name, case)]

    def _numbers(self, case: Case) -> range:
        return range(max(self.conditions.rounds_of(name, case) for name in self.engines))

    def _loaded_case(self, case: Case) -> CaseResult:
        result = CaseResult.of(case)
        first_outputs: dict[str, list[int]] = {}
        warm_up = case.warm_up(self.conditions.num_tokens)
        for name in self.engines:
            self._guarded(result, name, "warm-up", partial(self._warm_up, name, warm_up, case))
        for number in self._numbers(case):
            requests = case.requests(self.conditions.num_tokens, number)
            result.rounds.append({})
            result.runs.append({})
            for name in self._order(number, case):
                run = self._guarded(result, name, _round(number), partial(self._run, name, requests, case))
                if run is not None:
                    result.rounds[-1][name] = case.value(run, requests)
                    result.runs[-1][name] = _kept(run)
                    first_outputs.setdefault(name, run.token_ids[0])
        result.agreement = self._agreement(first_outputs)
        return result

    def _guarded(self, result: CaseResult, name: str, part: str, work: Callable[[], Any]) -> Any:
        """Do something with an engine; what it dies of is the case's, and the others go on."""
        self._done += 1
        if name in result.failures:
            return None
        try:
            done = work()
        except PeerError as error:
            result.failures[name] = f"{part}: {error}"
            if not isinstance(error, RunRefused):
                self._drop(name)
            done = None
        told = " failed" if name in result.failures else ""
        self._on_step(Step(f"{result.title}, {part}: {name}{told}", self._done, self._total))
        return done

    def _warm_up(self, name: str, requests: list[Request], case: Case) -> None:
        if name in self._unloadable:
            raise PeerError(self._unloadable[name])
        if name not in self._loaded:
            self._loaded[name] = self._start(name)
            try:
                self._loaded[name].load(_to_stay(name, self.options[name]))
            except PeerError as error:
                self._unloadable[name] = str(error)
                raise
        self._loaded[name].run(requests, case.static_batch, case.longest)

    def _run(self, name: str, requests: list[Request], case: Case) -> Run:
        run = self._loaded[name].run(requests, case.static_batch, case.longest)
        _require_as_asked(run, case)
        return run

    def _drop(self, name: str) -> None:
        """What an engine is after an error is unknown; the next case starts it anew."""
        if name in self._loaded:
            self._loaded.pop(name).close(gently=False)

    def _start(self, name: str) -> PeerProcess:
        return PeerProcess(self.engines[name], self.conditions.threads, self.conditions.cores)

    def _agreement(self, outputs: Mapping[str, list[int]]) -> dict[str, Agreement]:
        subject, *others = self.engines
        if subject not in outputs:
            return {}
        return {name: Agreement.of(outputs[name], outputs[subject]) for name in others if name in outputs}

    def _fresh_case(self, case: Case) -> CaseResult:
        result = CaseResult.of(case)
        for number in self._numbers(case):
            result.rounds.append({})
            for name in self._order(number, case):
                # While others start, the system may take files out of memory: the second start in a row is timed.
                if case.metric == "start":
                    warm_up = f"warm-up of {_round(number)}"
                    self._guarded(result, name, warm_up, partial(self._fresh_value, name, case, -1))
                value = self._guarded(result, name, _round(number), partial(self._fresh_value, name, case, number))
                if value is not None:
                    result.rounds[-1][name] = value
        return result

    def _fresh_value(self, name: str, case: Case, number: int) -> float:
        requests = case.requests(self.conditions.num_tokens, number)
        options = self.options[name]
        if case.metric == "memory":
            # As long as the work alone, or an engine would want room for one sequence of full length.
            longest = min(options.max_model_len, case.longest)
            options = dataclasses.replace(options, kv_cache_memory=self._room(requests), max_model_len=longest)
        with self._start(name) as process:
            process.load(options)
            if case.metric == "cache":
                return process.cache_bytes(requests) / 2**10
            run = process.run(requests, case.static_batch)
            return process.peak_memory() / 2**30 if case.metric == "memory" else run.first_token - process.started

    def _room(self, requests: list[Request]) -> int:
        return cache_tokens(requests) * self.conditions.cache_per_token


def lasting_settings(name: str, options: LoadOptions) -> dict[str, Any]:
    """What an engine is told that serves many runs: npu-zoo takes its cache's memory at once, as vLLM does."""
    return {"prefault_kv_cache": True} if name == SUBJECT and "prefault_kv_cache" not in options.settings else {}


def _to_stay(name: str, options: LoadOptions) -> LoadOptions:
    return dataclasses.replace(options, settings={**options.settings, **lasting_settings(name, options)})


def cache_tokens(requests: Sequence[Request]) -> int:
    """Tokens that a cache needs room for so that requests run all at once."""
    return sum(len(request.prompt) + request.max_tokens + KV_SLACK_TOKENS for request in requests)


def _require_as_asked(run: Run, case: Case) -> None:
    """Refuse a run that had part of its prompts, or a batch that did not run at once; a total may take several waves.

    Raises:
        RunRefused: so it was.
    """
    if run.cached_tokens and not case.shared_prefix:
        raise RunRefused(f"it took {run.cached_tokens} tokens of new prompts from its prefix cache")
    if run.preemptions and case.metric != "total":
        raise RunRefused(
            f"sequences lost their room and were computed again ({run.preemptions} preemptions), so that the batch did "
            "not run at once; take a smaller batch, or give --kv-cache-memory"
        )
    if run.ended_at_all_started and case.metric == "decode":
        raise RunRefused(
            f"{run.ended_at_all_started} of {case.count} sequences had ended when the last got its first token, so "
            "that the batch did not run at once; take a smaller batch or more output tokens, or give larger "
            "--max-num-seqs, --max-num-batched-tokens or --kv-cache-memory"
        )


def _round(number: int) -> str:
    return f"round {number + 1}"


def _kept(run: Run) -> dict[str, Any]:
    """A run's times relative to its start; the random tokens are of no use later."""
    kept = dataclasses.asdict(run)
    del kept["token_ids"]
    for name in ("first_token", "all_started", "end"):
        kept[name] -= run.start
    return {**kept, "start": 0.0}
