"""Runs a request in the engine, and sends its answer whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from npu_zoo.core.engine import GenerationRequest, RequestOutput
from npu_zoo.protocol.answering import Answering
from npu_zoo.server.bodies import ClientGone

PING = b": waiting\n\n"
"""A remark that clients skip; it keeps proxies from taking a queue for a dead connection."""

PING_S = 15.0
DONE = b"data: [DONE]\n\n"

Generate = Callable[[GenerationRequest], AsyncIterator[RequestOutput]]
State = tuple[int, RequestOutput]
ResultT = TypeVar("ResultT")


class Generation:
    """The requests of one HTTP request, as they run. They are ended with its ``async with`` block.

    States that nobody has taken yet are replaced by newer ones, so that a slow client costs neither memory nor time.

    Args:
        generate: runs one of them.
        release: called once, when none of them runs any more, however slowly the answer is read.
    """

    def __init__(self, generate: Generate, requests: Sequence[GenerationRequest], release: Callable[[], None]) -> None:
        self._requests = requests
        self._newest: dict[int, RequestOutput] = {}
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks = [asyncio.create_task(self._run(generate, index)) for index in range(len(requests))]
        self._all = asyncio.gather(*self._tasks, return_exceptions=True)
        self._all.add_done_callback(lambda _: release())

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait({self._all})

    async def states(self) -> AsyncIterator[State | None]:
        """Each request's newest state, with its place, whenever one has moved on; None where none has for a while.

        Raises:
            Exception: what generating one of them raised.
        """
        while True:
            late = await self._changed_or_late(PING_S)
            self._changed.clear()
            newest, self._newest = self._newest, {}
            for state in newest.items():
                yield state
            if self._error is not None:
                raise self._error
            if not self._newest and all(task.done() for task in self._tasks):
                return
            if late and not newest:
                yield None

    async def outputs(self) -> list[RequestOutput]:
        """Every request's last state.

        Raises:
            Exception: what generating one of them raised.
        """
        last = {state[0]: state[1] async for state in self.states() if state is not None}
        return [last[index] for index in range(len(self._requests))]

    async def _changed_or_late(self, seconds: float) -> bool:
        """Wait for a change; whether so many seconds passed without one.

        Up to Python 3.11, a wait_for takes no notice of a cancellation that comes together with the change.
        """
        late = False

        def wake() -> None:
            nonlocal late
            late = True
            self._changed.set()

        timer = asyncio.get_running_loop().call_later(seconds, wake)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()
        return late

    async def _run(self, generate: Generate, index: int) -> None:
        try:
            async for output in generate(self._requests[index]):
                self._newest[index] = output
                self._changed.set()
        except Exception as error:
            self._error = self._error or error
        finally:
            # After this task is done, so that the last of them is seen to be.
            asyncio.get_running_loop().call_soon(self._changed.set)


async def unless_gone(request: Request, work: Awaitable[ResultT]) -> ResultT:
    """The result of some work, which is cancelled when the client closes its connection.

    The request's body must have been read.

    Raises:
        ClientGone: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def events(
    answering: Answering,
    states: AsyncIterator[State | None],
    on_error: Callable[[Exception], dict[str, Any]],
    on_end: Callable[[], None],
) -> AsyncIterator[bytes]:
    """An answer as server-sent events.

    Args:
        on_error: the body of an error that comes when the answer has begun.
        on_end: called before the last event, at which a client may send its next request.
    """
    try:
        async for state in states:
            if state is None:
                yield PING
                continue
            for chunk in answering.chunks(*state):
                yield event(chunk)
        for chunk in answering.last_chunks():
            yield event(chunk)
    except Exception as error:
        last = event(on_error(error))
    else:
        last = DONE
    on_end()
    yield last


async def chained(first: State | None, states: AsyncIterator[State | None]) -> AsyncIterator[State | None]:
    """The states with the first of them, which was taken already."""
    yield first
    async for state in states:
        yield state


class EventStream(Response):
    """Sends events until they end or the client is gone.

    Args:
        parts: of the body.
        stack: closed at the end, however it comes.
    """

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncIterator[bytes], stack: contextlib.AsyncExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._parts = parts
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve as an ASGI application."""
        async with self._stack:
            sending = asyncio.ensure_future(self._send_all(send))
            gone = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
            finally:
                for task in (sending, gone):
                    task.cancel()
                await asyncio.wait({sending, gone})

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(data) + b"\n\n"


def encode_json(data: Any) -> bytes:
    """JSON in UTF-8 that stays one line for every reader: some split at these separators too."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085").encode()
