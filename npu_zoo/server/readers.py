"""Threads that render and tokenize, so that a long prompt holds nobody else up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from npu_zoo.server.admission import too_many

ResultT = TypeVar("ResultT")

_THREADS = 4  # more would only take turns
_RETRY_S = 1.0


class Readers:
    """A few threads, and a bounded queue of those who wait for one. All of it belongs to one event loop.

    A thread cannot be stopped: it stays taken until its work has ended, though nobody may wait for it any more.

    Args:
        max_waiting: calls that may wait for a thread.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting = 0
        self._free = asyncio.Semaphore(_THREADS)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="reader")

    async def run(self, read: Callable[[], ResultT]) -> ResultT:
        """What a call in a thread returns; one that is cancelled while it waits is never made.

        Raises:
            ApiError: 429 where too many wait.
        """
        await self._take()
        work = asyncio.get_running_loop().run_in_executor(self._threads, read)
        work.add_done_callback(self._release)
        await asyncio.wait({work})  # unlike awaiting it, this leaves it alone where the caller is cancelled
        return work.result()

    def check(self) -> None:
        """Raise the 429 that a call would meet now."""
        if self._waiting >= self._max_waiting:
            raise too_many(f"{self._waiting} requests wait to be read", code="queue_full", retry_after=_RETRY_S)

    def close(self) -> None:
        """Drop the threads; work that has begun goes on to its end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _take(self) -> None:
        if self._free.locked():
            self.check()
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1

    def _release(self, work: asyncio.Future[ResultT]) -> None:
        self._free.release()
        if not work.cancelled():
            work.exception()  # who waits for it has it; where nobody does, it is no news
