"""The engine's process: takes requests from front ends, steps, and tells them what came of it.

An engine never waits for a front end. What is new of a request is told once the front end has taken what was told
before, and stays with the request until then: a front end that is stopped costs the outputs of the requests that it
has submitted, and no more.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import npu_zoo
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Engine, EngineStats, RequestOutput
from npu_zoo.core.errors import EngineError, NpuZooError
from npu_zoo.dispatch import create_engine
from npu_zoo.parallel.processes import exit_on_sigterm
from npu_zoo.server.channel import Channel, ChannelClosed
from npu_zoo.server.messages import (
    Abort,
    DeltaEncoder,
    EngineInfo,
    Loading,
    Progress,
    Ready,
    Rejected,
    Started,
    Submit,
    portable_error,
)

_SECONDS_BETWEEN_TRIES = 0.1


@dataclass(frozen=True)
class EngineSetup:
    """What the engine's process is started with.

    Attributes:
        config: of the engine.
        listener: the descriptor of the Unix socket that front ends connect to, which the process inherits.
    """

    config: EngineConfig
    listener: int


def run(setup: EngineSetup, control: Channel) -> None:
    """The program of the engine's process, as :mod:`npu_zoo.server.child` calls it.

    An error of the engine leaves it without a shutdown, which might hang then: the end of the process frees all.

    Args:
        setup: what to run.
        control: to the supervisor.
    """
    npu_zoo.simulate()
    if sys.stderr is not None:
        faulthandler.enable()
    with exit_on_sigterm():
        engine = create_engine(setup.config, lambda *stage: _tell(control, Loading(*stage)))
    # What is there now stays: without this the collector would go through all of torch's modules in the midst of steps.
    gc.collect()
    gc.freeze()
    server = EngineServer(engine, socket.socket(fileno=setup.listener))
    signal.signal(signal.SIGTERM, lambda number, frame: server.stop())
    _tell(control, Started(server.info))
    server.serve()
    engine.shutdown()


def _tell(channel: Channel, message: object) -> None:
    with contextlib.suppress(ChannelClosed):  # who is gone is told by the channel itself
        channel.send(message)


class EngineServer:
    """Runs an engine for the front ends that connect.

    Args:
        engine: nobody else may use it.
        listener: the Unix socket that they connect to.

    Attributes:
        info: what they are told of the engine.
    """

    def __init__(self, engine: Engine, listener: socket.socket) -> None:
        explained = engine.explain()
        self.info = EngineInfo(os.getpid(), engine.config.model, explained["max_model_len"], explained)
        self._engine, self._listener = engine, listener
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()  # what other threads want done in this one
        self._front_ends: list[_FrontEnd] = []
        self._requests: dict[str, _Request] = {}
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Have :meth:`serve` return after the step that is under way; for signal handlers and other threads."""
        self._stopping.set()
        self._inbox.put(_nothing)

    def serve(self) -> None:
        """Run requests until :meth:`stop`, which aborts what is left; what the engine's step raises leaves it at once.

        Either way the front ends see that the engine is gone.
        """
        threading.Thread(target=self._accept, name="front ends", daemon=True).start()
        try:
            while not self._stopping.is_set():
                self._act(wait=not self._engine.has_unfinished_requests())
                if self._engine.has_unfinished_requests():
                    for output in self._engine.step():
                        self._note(output)
                self._tell_all()
            for request in list(self._requests.values()):
                self._abort(request)
        finally:
            for front_end in self._front_ends:
                front_end.channel.close()

    def _accept(self) -> None:
        with self._listener:
            while not self._stopping.is_set():
                try:
                    connection, _ = self._listener.accept()
                except OSError:  # such as no descriptor being left
                    time.sleep(_SECONDS_BETWEEN_TRIES)
                    continue
                if self._stopping.is_set():
                    connection.close()  # who it is comes again, to the next engine
                else:
                    self._inbox.put(partial(self._welcome, connection))

    def _act(self, *, wait: bool) -> None:
        """Do what is asked for by now; at least one thing where the engine has nothing to do."""
        for _ in range(max(self._inbox.qsize(), int(wait))):
            self._inbox.get()()

    def _welcome(self, connection: socket.socket) -> None:
        front_end = _FrontEnd(
            connection,
            lambda messages: self._inbox.put(partial(self._hear, front_end, messages)),
            lambda: self._inbox.put(partial(self._part_with, front_end)),
            lambda: self._inbox.put(_nothing),
        )
        self._front_ends.append(front_end)
        front_end.channel.start()
        _tell(front_end.channel, Ready(self.info, self._engine.stats()))

    def _hear(self, front_end: _FrontEnd, messages: Sequence[object]) -> None:
        for message in messages:
            if isinstance(message, Submit):
                self._submit(front_end, message)
            elif isinstance(message, Abort) and message.key in front_end.requests:
                self._abort(front_end.requests[message.key])

    def _part_with(self, front_end: _FrontEnd) -> None:
        """Free at once what a front end that is gone has asked for."""
        self._front_ends.remove(front_end)
        for request in list(front_end.requests.values()):
            self._abort(request)

    def _submit(self, front_end: _FrontEnd, message: Submit) -> None:
        asked = message.request
        request = _Request(asked.request_id, message.key, front_end)
        try:
            self._engine.add_request(
                asked.request_id,
                asked.prompt_token_ids,
                asked.sampling_params,
                priority=asked.priority,
                max_time=asked.max_time,
            )
        except Exception as error:  # a request that an engine stumbles over must not end the others
            _tell(front_end.channel, Rejected(message.key, _rejection(error)))
            return
        self._requests[request.request_id] = front_end.requests[request.key] = request

    def _abort(self, request: _Request) -> None:
        output = self._engine.abort_request(request.request_id)
        if output is not None:
            self._note(output)

    def _note(self, output: RequestOutput) -> None:
        """Keep a request's state for who asked for it."""
        request = self._requests[output.request_id]
        request.front_end.untold[request] = output
        if output.finished:
            del self._requests[request.request_id], request.front_end.requests[request.key]

    def _tell_all(self) -> None:
        stats = self._engine.stats()
        for front_end in self._front_ends:
            front_end.tell(stats)


class _FrontEnd:
    """A front end as the engine has it.

    Attributes:
        requests: its unfinished ones, by their keys.
        untold: states that it has not been told of.
    """

    def __init__(
        self,
        connection: socket.socket,
        on_messages: Callable[[Sequence[object]], None],
        on_closed: Callable[[], None],
        on_idle: Callable[[], None],
    ) -> None:
        self.requests: dict[int, _Request] = {}
        self.untold: dict[_Request, RequestOutput] = {}
        self.channel = Channel(connection, "the front end", on_messages, on_closed, on_idle)
        self._stats: EngineStats | None = None

    def tell(self, stats: EngineStats) -> None:
        """Tell it what is new, unless it has still to take what was told before."""
        if (self.untold or stats != self._stats) and self.channel.idle:
            deltas = [request.encoder.delta(output) for request, output in self.untold.items()]
            self.untold, self._stats = {}, stats
            _tell(self.channel, Progress(deltas, stats))


class _Request:
    """An unfinished request, and how much of it has been told."""

    def __init__(self, request_id: str, key: int, front_end: _FrontEnd) -> None:
        self.request_id, self.key, self.front_end = request_id, key, front_end
        self.encoder = DeltaEncoder(key)


def _rejection(error: Exception) -> NpuZooError:
    if isinstance(error, NpuZooError):
        return portable_error(error)
    traceback.print_exception(error)
    return EngineError("the engine failed to take the request; its log says why")


def _nothing() -> None:
    """Only wakes the engine's loop."""
