"""The engine as the front end has it: requests go there, and their states come back, through a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path

from npu_zoo.core.engine import EngineStats, GenerationRequest, RequestOutput
from npu_zoo.core.errors import EngineError, NpuZooError, UsageError
from npu_zoo.server.channel import Channel, ChannelClosed
from npu_zoo.server.messages import (
    Abort,
    EngineInfo,
    Progress,
    Ready,
    Rejected,
    RequestDelta,
    Submit,
    apply_delta,
    initial_output,
)

_SECONDS_BETWEEN_TRIES = 0.2
_LOST = "the engine was lost while the request ran; it is being started again"
_CLOSED = "the server ended before the request had finished"

OnStats = Callable[[EngineStats], None]


class EngineDied(EngineError):
    """The engine was lost, or is not there yet; the request may be sent again once it is ready."""


class ClientClosed(EngineDied):
    """The front end has left the engine, since the server ends."""


class EngineClient:
    """An engine in another process. All of it belongs to one event loop.

    It connects again by itself where the engine is lost: what runs fails then, and :attr:`ready` is False until an
    engine is there again.

    Args:
        path: the Unix socket of the engine.
        on_stats: called in the event loop with every new state of the engine.

    Attributes:
        info: the engine's own words, of the last one that was ready.
        stats: how the engine stood when it last told; all zero while there is none.
        losses: how many engines were lost.
    """

    def __init__(self, path: str | Path, on_stats: OnStats | None = None) -> None:
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.losses = 0
        self._path, self._on_stats = str(path), on_stats
        self._ready = asyncio.Event()
        self._channel: Channel | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._closed = False
        self._keys = itertools.count()
        self._streams: dict[int, _Stream] = {}
        self._by_id: dict[str, _Stream] = {}

    @property
    def ready(self) -> bool:
        """Whether the engine takes requests."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Begin to connect; :attr:`ready` is set when the engine has answered."""
        self._connecting = asyncio.create_task(self._connect())

    async def wait_ready(self) -> EngineInfo:
        """Wait for an engine that takes requests."""
        await self._ready.wait()
        assert self.info is not None
        return self.info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Run a request and yield its state whenever it has moved on, the last one with ``finished``.

        The state is the running one, brought up to date in place; what comes while the consumer is at work is one
        step for it. Closing the generator, or cancelling the task that waits in it, aborts the request.

        Raises:
            EngineDied: the engine was lost, or is not ready.
            UsageError: the request's id is in use by an unfinished one.
            NpuZooError: the engine does not take the request; of the class that its ``add_request`` raises.
        """
        stream, finished = self._submit(request), False
        try:
            while not finished:
                await stream.moved.wait()
                stream.moved.clear()
                if stream.error is not None:
                    raise stream.error
                finished = stream.output.finished  # as it is yielded; it may move on before the consumer is back
                yield stream.output
        finally:
            if self._streams.get(stream.key) is stream:
                self._forget(stream)
                self._send(Abort(stream.key))

    async def abort(self, request_id: str) -> None:
        """End a request at once: its generator yields the last state and ends. Nothing where no such one runs."""
        stream = self._by_id.get(request_id)
        if stream is not None:
            self._send(Abort(stream.key))

    async def close(self) -> None:
        """Leave the engine, which aborts what runs; generators raise ClientClosed."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()
        self._lose(ClientClosed, _CLOSED)

    def _submit(self, request: GenerationRequest) -> _Stream:
        if self._closed:
            raise ClientClosed(_CLOSED)
        if not self.ready:
            raise EngineDied("the engine is not ready; it is being started")
        if request.request_id in self._by_id:
            raise UsageError(f"request id '{request.request_id}' is in use by an unfinished request")
        stream = _Stream(next(self._keys), initial_output(request))
        if not self._send(Submit(stream.key, request)):
            raise EngineDied(_LOST)
        self._streams[stream.key] = self._by_id[request.request_id] = stream
        return stream

    def _send(self, message: Submit | Abort) -> bool:
        """Whether there is somebody to send it to."""
        try:
            if self._channel is not None:
                self._channel.send(message)
            return self._channel is not None
        except ChannelClosed:
            return False

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        while (connection := _connection(self._path)) is None:
            await asyncio.sleep(_SECONDS_BETWEEN_TRIES)
        channel: Channel
        channel = self._channel = Channel(
            connection,
            "the engine",
            lambda messages: _post(loop, partial(self._hear, channel, messages)),
            lambda: _post(loop, partial(self._part_with, channel)),
        )
        channel.start()

    def _hear(self, channel: Channel, messages: Sequence[object]) -> None:
        if channel is not self._channel or self._closed:
            return
        for message in messages:
            if isinstance(message, Progress):
                self._move_on(message.deltas)
                self._note(message.stats)
            elif isinstance(message, Rejected):
                self._reject(message)
            elif isinstance(message, Ready):
                self.info = message.info
                self._ready.set()
                self._note(message.stats)

    def _move_on(self, deltas: Sequence[RequestDelta]) -> None:
        for delta in deltas:
            stream = self._streams.get(delta.key)
            if stream is not None:  # else nobody waits for it any more
                apply_delta(stream.output, delta)
                stream.moved.set()
                if delta.finished:
                    self._forget(stream)

    def _reject(self, message: Rejected) -> None:
        stream = self._streams.get(message.key)
        if stream is not None:
            self._fail(stream, message.error)

    def _note(self, stats: EngineStats) -> None:
        self.stats = stats
        if self._on_stats is not None:
            self._on_stats(stats)

    def _part_with(self, channel: Channel) -> None:
        if channel is self._channel and not self._closed:
            self._lose(EngineDied, _LOST)
            self._connecting = asyncio.create_task(self._connect())

    def _lose(self, kind: type[EngineDied], why: str) -> None:
        self._channel = None
        self.losses += self.ready and not self._closed
        self._ready.clear()
        for stream in list(self._streams.values()):
            self._fail(stream, kind(why))
        self._note(EngineStats())

    def _fail(self, stream: _Stream, error: NpuZooError) -> None:
        self._forget(stream)
        stream.error = error
        stream.moved.set()

    def _forget(self, stream: _Stream) -> None:
        del self._streams[stream.key], self._by_id[stream.output.request_id]


class _Stream:
    """A request that runs, and whether its consumer has something to look at."""

    def __init__(self, key: int, output: RequestOutput) -> None:
        self.key, self.output = key, output
        self.moved = asyncio.Event()
        self.error: NpuZooError | None = None


def _connection(path: str) -> socket.socket | None:
    """A connection to the socket; None where nobody listens or all places to wait are taken."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    connection.setblocking(True)
    return connection


def _post(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(act)
