"""States of requests on their way to an answer, whatever comes at the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from npu_zoo.core.engine import GenerationRequest, RequestMetrics, RequestOutput
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.server import answers
from npu_zoo.server.answers import Generation

REQUEST = GenerationRequest("r", [1], SamplingParams())


def output(*, finished: bool = False) -> RequestOutput:
    return RequestOutput("r", None, [1], [], finished, RequestMetrics(0.0))


class Source:
    """An engine that tells when a test has it tell."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self.released = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[RequestOutput]:
        finished = False
        while not finished:
            found = await self.news.get()
            finished = found.finished
            yield found

    def start(self) -> Generation:
        return Generation(self.generate, [REQUEST], self.release)

    def release(self) -> None:
        self.released += 1


@pytest.mark.parametrize("turns", range(10))
def test_a_client_that_leaves_as_news_come_is_not_overlooked(turns: int) -> None:
    async def run() -> None:
        source = Source()
        async with source.start() as generation:
            waiting = asyncio.ensure_future(anext(generation.states()))
            await asyncio.sleep(0.01)
            source.news.put_nowait(output())
            for _ in range(turns):
                await asyncio.sleep(0)
            left = waiting.cancel()
            await asyncio.wait({waiting})
            assert waiting.cancelled() == left
        assert source.released == 1

    asyncio.run(run())


def test_silence_is_told_and_ends_with_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PING_S", 0.01)

    async def run() -> None:
        source = Source()
        async with source.start() as generation:
            states = generation.states()
            assert [await anext(states) for _ in range(3)] == [None] * 3
            last = output(finished=True)
            source.news.put_nowait(last)
            assert [state async for state in states if state is not None] == [(0, last)]
        assert source.released == 1

    asyncio.run(run())


def test_states_that_nobody_takes_are_replaced() -> None:
    async def run() -> None:
        source = Source()
        async with source.start() as generation:
            found = [output(), output(), output(finished=True)]
            for one in found:
                source.news.put_nowait(one)
            await asyncio.sleep(0.01)
            assert [state async for state in generation.states()] == [(0, found[-1])]

    asyncio.run(run())
