"""Threads that read: no more at once than there are, and no more that wait than may."""

from __future__ import annotations

import asyncio
import threading

import pytest

from npu_zoo.protocol.errors import ApiError
from npu_zoo.server.readers import Readers


class Work:
    """Work that goes on until it is let go, and how much of it runs."""

    def __init__(self) -> None:
        self.running = self.most = self.calls = 0
        self.go = threading.Event()
        self._lock = threading.Lock()

    def __call__(self) -> int:
        with self._lock:
            self.running += 1
            self.calls += 1
            self.most = max(self.most, self.running)
        self.go.wait(60)
        with self._lock:
            self.running -= 1
        return 7


async def until_running(work: Work, count: int) -> None:
    while work.running != count:
        await asyncio.sleep(0.005)


def test_threads_whose_callers_have_left_still_count() -> None:
    async def run() -> None:
        readers, work = Readers(64), Work()
        first = [asyncio.create_task(readers.run(work)) for _ in range(4)]
        await until_running(work, 4)
        for task in first:
            task.cancel()
        await asyncio.wait(first)
        later = [asyncio.create_task(readers.run(work)) for _ in range(8)]
        await asyncio.sleep(0.05)
        assert work.calls == 4
        for task in later[:4]:
            task.cancel()
        work.go.set()
        found = await asyncio.gather(*later, return_exceptions=True)
        assert found[4:] == [7] * 4
        assert (work.calls, work.most) == (8, 4)  # those that left while they waited were never called
        readers.close()

    asyncio.run(run())


@pytest.mark.parametrize("left", [0, 4])
def test_no_more_wait_than_may(left: int) -> None:
    """Threads whose callers have left are no room for others."""

    async def run() -> None:
        readers, work = Readers(2), Work()
        begun = [asyncio.create_task(readers.run(work)) for _ in range(4)]
        await until_running(work, 4)
        for task in begun[:left]:
            task.cancel()
        tasks = begun[left:] + [asyncio.create_task(readers.run(work)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="2 requests wait") as refused:
            await readers.run(work)
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        with pytest.raises(ApiError):
            readers.check()
        work.go.set()
        assert await asyncio.gather(*tasks) == [7] * (6 - left)
        readers.check()
        readers.close()

    asyncio.run(run())


def test_what_the_work_raises_is_raised() -> None:
    async def run() -> None:
        readers = Readers(1)
        with pytest.raises(ZeroDivisionError):
            await readers.run(lambda: 1 // 0)
        readers.close()

    asyncio.run(run())
