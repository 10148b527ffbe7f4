"""One level of load: requests are sent when they are due, and each is observed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from npu_zoo.evaluation.serving.arrivals import Load, OpenLoop
from npu_zoo.evaluation.serving.client import Client, Exchange
from npu_zoo.evaluation.serving.observation import Failure, Observation, Status
from npu_zoo.evaluation.serving.requests import RequestForm
from npu_zoo.evaluation.serving.stream import Answer, read_answer
from npu_zoo.evaluation.serving.work import Ask

_EVENTS_AT_ONCE = 16
"""Events that are read before other requests get their turn."""

_DIGITS = 6
_GIVEN_UP = ("abort", "error")
"""What servers call the end of an answer that they gave up."""


@dataclass
class Tally:
    """How far a level is.

    Attributes:
        num_requests: that will be sent; None where a duration alone ends the level.
        duration: seconds of sending; None where a number of requests alone does.
        output_tokens: of ended requests.
    """

    num_requests: int | None = None
    duration: float | None = None
    sent: int = 0
    completed: int = 0
    failed: int = 0
    output_tokens: int = 0

    @property
    def ended(self) -> int:
        """Requests that have ended by themselves."""
        return self.completed + self.failed


@dataclass(frozen=True)
class Level:
    """A load, and how much of it.

    Attributes:
        num_requests: None for as many as the duration has.
        duration: seconds after which nothing more is sent; what runs then is waited for.
        seed: of the arrivals and the work.
    """

    load: Load
    num_requests: int | None
    duration: float | None = None
    seed: str = "0"

    def source(self, purpose: str) -> Random:
        """Random numbers of one purpose, so that one does not change another's."""
        return Random(f"{purpose} {self.seed}")


@dataclass
class LevelRun:
    """What a level came to.

    Attributes:
        observations: by their order of sending.
        seconds: until the last response had ended.
        client_cpu_share: processor time of this process per second: near 1, its own slowness is measured.
        interrupted: whether it was stopped.
    """

    observations: list[Observation] = field(default_factory=list)
    seconds: float = 0.0
    client_cpu_share: float = 0.0
    interrupted: bool = False


OnChange = Callable[[Tally], None]


async def run_level(
    client: Client,
    level: Level,
    form: RequestForm,
    asks: Iterator[Ask],
    *,
    stop: asyncio.Event | None = None,
    on_change: OnChange = lambda tally: None,
) -> LevelRun:
    """Send a level's requests and observe them all; failures are part of what comes back.

    Args:
        stop: once set, nothing more is sent, and what runs is cancelled.
        on_change: told after each sending and each end.
    """
    stop = stop or asyncio.Event()
    with _garbage_frozen():
        return await _Sender(client, level, form, asks, on_change).run(stop)


class _Sender:
    def __init__(
        self, client: Client, level: Level, form: RequestForm, asks: Iterator[Ask], on_change: OnChange
    ) -> None:
        self._client, self._level, self._form, self._asks = client, level, form, asks
        self._on_change = on_change
        self._tally = Tally(level.num_requests, level.duration)
        self._sending: set[asyncio.Task[None]] = set()
        self._reading: set[asyncio.Task[None]] = set()
        self._observations: list[Observation] = []
        self._start = 0.0
        self._prepared = 0

    async def run(self, stop: asyncio.Event) -> LevelRun:
        self._start, busy = time.monotonic(), time.process_time()
        load = self._level.load
        sender = asyncio.create_task(self._open(load) if isinstance(load, OpenLoop) else self._closed(load.concurrency))
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({sender, stopped}, return_when=asyncio.FIRST_COMPLETED)
            interrupted = not sender.done()
        finally:
            for task in (sender, stopped, *self._sending):
                task.cancel()
            await asyncio.gather(sender, stopped, *self._sending, return_exceptions=True)
        share = (time.process_time() - busy) / max(self._now(), 1e-9)
        await asyncio.gather(*self._reading)
        if not sender.cancelled():
            sender.result()
        observations = sorted(self._observations, key=lambda observation: observation.index)
        seconds = max((observation.ended for observation in observations), default=0.0)
        return LevelRun(observations, seconds, share, interrupted)

    def _now(self) -> float:
        return round(time.monotonic() - self._start, _DIGITS)

    def _next(self) -> tuple[Ask, bytes] | None:
        """The next request, with its body made ahead of its time; None where there is none."""
        limit = self._level.num_requests
        if limit is not None and self._prepared >= limit:
            return None
        self._prepared += 1
        ask = next(self._asks)
        return ask, self._form.encode(ask)

    def _over(self, at: float) -> bool:
        return self._level.duration is not None and at >= self._level.duration

    async def _open(self, load: OpenLoop) -> None:
        for due in load.send_times(self._level.source("arrivals")):
            prepared = None if self._over(max(due, self._now())) else self._next()
            if prepared is None:
                break
            # At an infinite rate too, others get their turn between two sendings.
            await asyncio.sleep(max(0.0, due - self._now()))
            self._start_task(self._sending, self._send(*prepared, round(due, _DIGITS)))
        await asyncio.gather(*self._sending)

    async def _closed(self, concurrency: int) -> None:
        for _ in range(concurrency):
            self._start_task(self._sending, self._client_loop())
        await asyncio.gather(*self._sending)

    async def _client_loop(self) -> None:
        while not self._over(self._now()) and (prepared := self._next()) is not None:
            exchange = await self._send(*prepared)
            if exchange.cancelled:
                return

    def _take_index(self) -> int:
        self._tally.sent += 1
        self._on_change(self._tally)
        return self._tally.sent - 1

    async def _send(self, ask: Ask, body: bytes, due: float | None = None) -> Exchange:
        index = self._take_index()
        exchange = await self._client.exchange(self._form.route, body, self._now)
        self._start_task(self._reading, self._read(exchange, ask, index, due))
        return exchange

    async def _read(self, exchange: Exchange, ask: Ask, index: int, due: float | None) -> None:
        answer = await read_slowly(exchange)
        observation = observe(exchange, answer, ask, index, due)
        self._observations.append(observation)
        self._tally.completed += observation.status == "completed"
        self._tally.failed += observation.status == "failed"
        self._tally.output_tokens += observation.output_tokens
        self._on_change(self._tally)

    def _start_task(self, tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def read_slowly(exchange: Exchange) -> Answer:
    """The answer of an exchange, read in turns with what else there is to do."""
    answer = Answer()
    for number, answer in enumerate(read_answer(exchange.pieces)):  # noqa: B007
        if number % _EVENTS_AT_ONCE == 0:
            await asyncio.sleep(0)
    return answer


def observe(exchange: Exchange, answer: Answer, ask: Ask, index: int, due: float | None = None) -> Observation:
    """What an exchange and the answer in it say of a request."""
    status, failure = _judge(exchange, answer)
    texts = sum(1 for size in answer.characters if size)
    counted = answer.tokens("completion_tokens")
    return Observation(
        index=index,
        due=due,
        sent=exchange.sent,
        arrivals=tuple(answer.arrivals),
        characters=tuple(answer.characters),
        ended=exchange.ended,
        status=status,
        failure=failure,
        finish_reason=answer.finish_reason,
        asked_prompt_tokens=ask.asked_prompt_tokens,
        max_tokens=ask.max_tokens,
        prompt_tokens=answer.tokens("prompt_tokens"),
        output_tokens=texts if counted is None else counted,
        counted_by_server=counted is not None,
    )


def _judge(exchange: Exchange, answer: Answer) -> tuple[Status, Failure | None]:
    """A whole answer counts whatever became of the connection after it."""
    if answer.failure:
        return "failed", answer.failure
    if answer.finish_reason in _GIVEN_UP:
        return "failed", Failure(kind="error", message=f"the server ended the answer with {answer.finish_reason!r}")
    if answer.whole:
        return "completed", None
    if exchange.cancelled:
        return "cancelled", None
    return "failed", exchange.failure or _cut_off(exchange, answer)


def _cut_off(exchange: Exchange, answer: Answer) -> Failure:
    if answer.done:
        return Failure(kind="malformed", message="the stream ended without an answer")
    return Failure(kind="closed", message="the stream ended before the answer did, without finish_reason or [DONE]")


@contextlib.contextmanager
def _garbage_frozen() -> Iterator[None]:
    """What is there already is not looked at by collections, whose pauses would be measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
