"""Runs any number of requests through an engine, of which only a bounded number is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from npu_zoo.core.engine import Engine, GenerationRequest, RequestOutput
from npu_zoo.core.errors import EngineError, UsageError

SEQUENCES_AHEAD = 2
"""How many times ``max_num_seqs`` are with the engine: while as many run, as many wait with their prompts ready."""


class Work(Protocol):
    """What becomes one request or several, whose results belong together."""

    def prepare(self) -> Sequence[GenerationRequest]:
        """The requests; made only when their turn comes. Any exception refuses this work and no other."""


WorkT = TypeVar("WorkT", bound=Work)


@dataclass(frozen=True)
class Finished(Generic[WorkT]):
    """A work that is over.

    Attributes:
        outputs: one per request, in their order; empty where it was refused.
        error: why it was refused; None where it ran.
    """

    work: WorkT
    outputs: Sequence[RequestOutput] = ()
    error: Exception | None = None


@dataclass
class _Running(Generic[WorkT]):
    """A work whose requests are with the engine."""

    work: WorkT
    requests: Sequence[GenerationRequest]
    outputs: dict[str, RequestOutput] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return len(self.outputs) == len(self.requests)

    def result(self) -> Finished[WorkT]:
        return Finished(self.work, [self.outputs[request.request_id] for request in self.requests])


class OfflineRunner:
    """Feeds an engine, which is its own meanwhile.

    Args:
        max_sequences: no further work is taken while as many sequences (one for each of a request's ``n`` completions)
            are with the engine. Unset: :data:`SEQUENCES_AHEAD` times ``max_num_seqs``.
    """

    def __init__(self, engine: Engine, max_sequences: int | None = None) -> None:
        self.engine = engine
        self.max_sequences = max_sequences or SEQUENCES_AHEAD * engine.config.max_num_seqs

    def run(
        self,
        works: Iterable[WorkT],
        *,
        on_output: Callable[[RequestOutput], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Finished[WorkT]]:
        """Run all of them and yield each as soon as it is over, refused ones too; nothing is dropped.

        Closing the iterator aborts what runs, and so does an exception.

        Args:
            works: asked for one by one, as there is room.
            on_output: called with the state of every request that a step has moved on.
            stopped: asked between steps; once true, what runs is aborted and the iterator ends.

        Raises:
            EngineError: the engine cannot go on; what has been yielded is good.
        """
        feed = _Feed(self.engine, iter(works), self.max_sequences)
        try:
            while not stopped():
                yield from feed.fill(stopped)
                if not feed.running:
                    return
                yield from feed.step(on_output)
        finally:
            feed.abort()


class _Feed(Generic[WorkT]):
    """What one run has with the engine."""

    def __init__(self, engine: Engine, works: Iterator[WorkT], max_sequences: int) -> None:
        self.running: dict[str, _Running[WorkT]] = {}
        self._engine, self._works, self._max = engine, works, max_sequences
        self._sequences = 0

    def fill(self, stopped: Callable[[], bool]) -> Iterator[Finished[WorkT]]:
        """Take works as long as there is room; yields those that were refused."""
        while self._sequences < self._max and not stopped():
            work = next(self._works, None)
            if work is None:
                return
            finished = self._take(work)
            if finished is not None:
                yield finished

    def step(self, on_output: Callable[[RequestOutput], None] | None) -> Iterator[Finished[WorkT]]:
        """One step of the engine; yields what ended in it."""
        if not self._engine.has_unfinished_requests():
            raise EngineError("the engine lost requests: it has none, and some have not finished")
        for output in self._engine.step():
            if output.request_id not in self.running:
                continue
            if on_output is not None:
                on_output(output)
            if output.finished:
                yield from self._end(output)

    def abort(self) -> None:
        """Take everything back that has not finished."""
        for request_id in list(self.running):
            self._engine.abort_request(request_id)
        self.running.clear()

    def _take(self, work: WorkT) -> Finished[WorkT] | None:
        try:
            requests = work.prepare()
        except Exception as error:
            return Finished(work, error=error)
        running = _Running(work, requests)
        try:
            for request in requests:
                self._add(request, running)
        except UsageError as error:
            self._take_back(running)
            return Finished(work, error=error)
        return None if requests else Finished(work)

    def _add(self, request: GenerationRequest, running: _Running[WorkT]) -> None:
        self._engine.add_request(
            request.request_id,
            request.prompt_token_ids,
            request.sampling_params,
            priority=request.priority,
            max_time=request.max_time,
        )
        self.running[request.request_id] = running
        self._sequences += request.sampling_params.n

    def _take_back(self, running: _Running[WorkT]) -> None:
        for request in running.requests:
            if self.running.get(request.request_id) is running:
                self._engine.abort_request(request.request_id)
                self._forget(request.request_id, request.sampling_params.n)

    def _end(self, output: RequestOutput) -> Iterator[Finished[WorkT]]:
        running = self._forget(output.request_id, len(output.outputs))
        running.outputs[output.request_id] = output
        if running.finished:
            yield running.result()

    def _forget(self, request_id: str, sequences: int) -> _Running[WorkT]:
        self._sequences -= sequences
        return self.running.pop(request_id)
