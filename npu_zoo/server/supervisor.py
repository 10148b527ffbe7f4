"""The process that ``npu-zoo serve`` is: it starts the engine and the front end, and keeps both running.

It holds the listening socket, so that clients wait and are not refused while a front end is started anew, and imports
nothing heavy, so that little can go wrong in it. Everything it does happens in one thread, as events and moments come.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import npu_zoo
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import ConfigError, EngineError, HardwareError, NpuZooError
from npu_zoo.dispatch import create_engine
from npu_zoo.parallel.children import describe_end
from npu_zoo.parallel.environment import LaunchEnvironment
from npu_zoo.platforms.ports import port_users
from npu_zoo.server.child import ChildProcess
from npu_zoo.server.engine_process import EngineSetup
from npu_zoo.server.front_end_process import FrontEndSetup, FrontEndStart
from npu_zoo.server.messages import EngineInfo, Failed, Loading, Started
from npu_zoo.server.orphans import adopt_orphans, children, kill_orphans, orphans

FRONT_END = "npu_zoo.server.front_end:serve"
GRACE_PERIOD_S = 30.0
"""How long running requests may take after a SIGTERM."""

_INTERRUPTED = 128 + signal.SIGINT
_SECONDS_TO_END = 10.0
"""How long a process may take to end, after all that it has to wait for."""
_SECONDS_FOR_ORPHANS = 10.0
_SECONDS_BETWEEN_LOOKS = 0.05
_BACKLOG = 2048
"""Clients that may wait for a front end; the system may have a lower limit of its own."""
_SOCKET = "engine.sock"
_LONGEST_PATH = 90
"""Characters of the directory, as the system limits a socket's whole path to 107."""


@dataclass(frozen=True)
class RestartPolicy:
    """When a process that died is started again.

    Attributes:
        max_deaths: so many in a row are borne, each without ``healthy_seconds`` of service before it.
        healthy_seconds: of service after which earlier deaths no longer count.
        backoff: seconds before the start after the second death, twice as many after the third, and so on; the start
            after the first one is at once.
        max_backoff: seconds at most.
    """

    max_deaths: int = 5
    healthy_seconds: float = 60.0
    backoff: float = 1.0
    max_backoff: float = 30.0

    def delay(self, deaths: int) -> float | None:
        """Seconds to wait after this many deaths; None where it is enough."""
        if deaths > self.max_deaths:
            return None
        return 0.0 if deaths == 1 else min(self.backoff * 2.0 ** (deaths - 2), self.max_backoff)


class Supervisor:
    """Runs a server.

    Args:
        config: of the engine.
        listener: the TCP socket that clients connect to, as :func:`listen` makes it.
        front_end: see :class:`~npu_zoo.server.front_end_process.FrontEndStart`.
        options: for the front end, as :class:`~npu_zoo.server.front_end_process.FrontEndSetup` has them.
        grace_period: seconds that running requests may take after a SIGTERM.
        policy: of both processes. Where a launcher started this one, an engine that dies ends the server, since its
            ranks can only be started together, by the launcher.
        on_loading: called with the stages of the engine's starts.
        on_ready: called each time that the engine takes requests.
        tell: called with a line of text for the log.
    """

    def __init__(
        self,
        config: EngineConfig,
        listener: socket.socket,
        *,
        front_end: str = FRONT_END,
        options: Any = None,
        grace_period: float = GRACE_PERIOD_S,
        policy: RestartPolicy | None = None,
        on_loading: Progress | None = None,
        on_ready: Callable[[EngineInfo], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._config, self._listener, self._options = config, listener, options
        self._function, self._grace_period = front_end, grace_period
        self._policy = policy or RestartPolicy()
        self._launched = LaunchEnvironment.from_environ(os.environ) is not None
        self._on_loading, self._on_ready, self._tell = on_loading, on_ready, tell or _print
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._moments: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._before: set[int] = set()
        self._stopping = False
        self._code = 0
        self._end: int | NpuZooError | None = None

    def run(self) -> int:
        """Serve until a signal says to stop; to be called once, and in the main thread for the signals to be heard.

        SIGTERM, SIGINT and SIGHUP (a terminal that closes, unless ``nohup`` had it ignored) have the front end finish
        what runs, then end the engine. A SIGINT after that ends all at once. The listener is closed in the end, and
        what this process has by then for children that it had not before is ended.

        Returns:
            The exit code: 0 after SIGTERM and SIGHUP, 130 after SIGINT, 1 where the engine died before all had
            finished.

        Raises:
            NpuZooError: the engine or the front end cannot start (its own error), or one of them died too often.
        """
        self._before = children()
        adopt_orphans()
        with self._listener, _private_directory() as folder, _engine_listener(folder) as listener, self._signals():
            self._make_roles(folder / _SOCKET, listener)
            try:
                self._start(self._engine)
                self._start(self._front_end)
                while self._end is None:
                    self._next()()
            finally:
                self._end_all()
        if isinstance(self._end, NpuZooError):
            raise self._end
        return self._end

    def _make_roles(self, path: Path, listener: socket.socket) -> None:
        setup = EngineSetup(self._config, listener.fileno())
        self._engine = _Role("engine", "npu_zoo.server.engine_process:run", setup, setup.listener)
        front_end = FrontEndSetup(self._config, self._options, str(path), self._grace_period)
        start = FrontEndStart(self._function, self._listener.fileno(), front_end)
        self._front_end = _Role("front end", "npu_zoo.server.front_end_process:run", start, start.listener)

    def _start(self, role: _Role) -> None:
        if self._stopping:
            return
        try:
            role.start(
                lambda messages: self._events.put(partial(self._hear, role, messages)),
                lambda code: self._events.put(partial(self._see_off, role, code)),
            )
        except OSError as error:
            self._end = EngineError(f"the process of the {role.name} cannot be started: {error}")
        if role is self._front_end:
            role.serving_since = time.monotonic()

    def _hear(self, role: _Role, messages: Sequence[object]) -> None:
        for message in messages:
            if isinstance(message, Loading):
                self._say(self._on_loading, message.stage, message.done, message.total)
            elif isinstance(message, Started):
                role.serving_since, role.has_served = time.monotonic(), True
                self._say(self._on_ready, message.info)
            elif isinstance(message, Failed):
                role.failure = message
                self._kill_later(role, _SECONDS_TO_END)

    def _see_off(self, role: _Role, code: int, since: float | None = None) -> None:
        """Wait for what the process has left behind, such as ranks: they may still hold memory of a device."""
        role.alive = False
        known = self._before | {r.pid for r in (self._engine, self._front_end) if r.alive}
        waited = 0.0 if since is None else time.monotonic() - since
        if not orphans(known) or waited > 2 * _SECONDS_FOR_ORPHANS:
            self._judge(role, code)
            return
        if waited > _SECONDS_FOR_ORPHANS:
            kill_orphans(known)
        self._later(_SECONDS_BETWEEN_LOOKS, partial(self._see_off, role, code, time.monotonic() - waited))

    def _judge(self, role: _Role, code: int) -> None:
        """What a process's end means for the server."""
        pid, role.process = role.pid, None
        what = f"failed: {role.failure.error}" if role.failure is not None else describe_end(code)
        if self._stopping:
            if role is self._engine and self._front_end.process is not None and self._end is None:
                self._say(self._tell, f"the engine (pid {pid}) {what}, before all requests had finished")
                self._code = self._code or 1
            self._go_on_ending()
            return
        self._end = role.final_error()
        if self._end is None:
            self._start_again(role, f"the {role.name} (pid {pid}) {what}")

    def _start_again(self, role: _Role, what: str) -> None:
        served = 0.0 if role.serving_since is None else time.monotonic() - role.serving_since
        role.deaths = 1 if served >= self._policy.healthy_seconds else role.deaths + 1
        delay = self._policy.delay(role.deaths)
        if role is self._engine and self._launched:
            self._end = EngineError(f"{what}; a launcher starts its ranks, so the server ends")
        elif delay is None:
            often = f"it ended {role.deaths} times without {self._policy.healthy_seconds:g} s of service"
            self._end = EngineError(f"{what}; {often}, so the server ends")
        else:
            self._say(self._tell, f"{what}; it is started again" + (f" in {delay:g} s" if delay else ""))
            self._later(delay, partial(self._start, role))

    def _stop(self, number: int) -> None:
        if self._stopping:
            if number == signal.SIGINT:
                self._kill(self._front_end)
                self._kill(self._engine)
                self._end = _INTERRUPTED
            return
        self._stopping, self._code = True, _INTERRUPTED if number == signal.SIGINT else 0
        if self._front_end.process is not None:
            name = signal.Signals(number).name
            self._say(self._tell, f"{name}: what runs may take {self._grace_period:g} s to finish")
            self._front_end.process.send_signal(signal.SIGTERM)
            self._kill_later(self._front_end, self._grace_period + _SECONDS_TO_END)
        self._go_on_ending()

    def _go_on_ending(self) -> None:
        if self._front_end.process is not None:
            return
        self._listener.close()
        if self._engine.process is None:
            self._end = self._code if self._end is None else self._end
        elif self._engine.alive:
            self._engine.process.send_signal(signal.SIGTERM)
            self._kill_later(self._engine, _SECONDS_TO_END)

    def _end_all(self) -> None:
        """End what runs, whatever this process ends for."""
        self._stopping = True
        for role in (self._engine, self._front_end):
            if role.process is not None:
                role.process.send_signal(signal.SIGTERM)
                self._kill_later(role, _SECONDS_TO_END)
        while self._engine.process is not None or self._front_end.process is not None:
            self._next()()

    def _say(self, say: Callable[..., None] | None, *words: Any) -> None:
        """Call what tells the user; that nobody reads it any more is no reason to end."""
        with contextlib.suppress(OSError):
            if say is not None:
                say(*words)

    def _kill_later(self, role: _Role, seconds: float) -> None:
        process = role.process
        self._later(seconds, lambda: self._kill(role) if role.process is process else None)

    def _kill(self, role: _Role) -> None:
        if role.process is not None:
            role.process.send_signal(signal.SIGKILL)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._moments, (time.monotonic() + seconds, next(self._numbers), act))

    def _next(self) -> Callable[[], None]:
        """What is to be done next, once there is something."""
        timeout = max(0.0, self._moments[0][0] - time.monotonic()) if self._moments else None
        try:
            return self._events.get(timeout=timeout)
        except Empty:
            return heapq.heappop(self._moments)[2]

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = [signal.signal(n, lambda n, frame: self._events.put(partial(self._stop, n))) for n in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


class _Role:
    """One of the server's two processes, over all its lives.

    Attributes:
        process: the one that lives, or whose remains are being seen off.
        alive: which of both.
        failure: what it said of its end.
        deaths: in a row.
        serving_since: when it began to serve; None where it does not yet.
        has_served: whether one of them has.
    """

    def __init__(self, name: str, target: str, payload: object, descriptor: int) -> None:
        self.name = name
        self._target, self._payload, self._descriptor = target, payload, descriptor
        self.process: ChildProcess | None = None
        self.alive = False
        self.failure: Failed | None = None
        self.deaths = 0
        self.serving_since: float | None = None
        self.has_served = False

    @property
    def pid(self) -> int:
        """Of the process, which must be there."""
        assert self.process is not None
        return self.process.pid

    def start(self, on_messages: Callable[[Sequence[object]], None], on_exit: Callable[[int], None]) -> None:
        """Start a process; raises OSError."""
        self.failure, self.serving_since = None, None
        self.process = ChildProcess(self.name, self._target, self._payload, [self._descriptor], on_messages, on_exit)
        self.alive = True

    def final_error(self) -> NpuZooError | None:
        """The error of a process that would fail the same way again: one that it raised before it served."""
        if self.failure is None or self.has_served:
            return None
        if self.failure.on_purpose:
            return self.failure.error
        return None if self.serving_since is not None else EngineError(f"the {self.name}: {self.failure.error}")


def follow(config: EngineConfig) -> None:
    """Where a launcher started this process as another rank than the first: work for that one's engine.

    To be called before :func:`listen`, as the first rank's process alone is the server.

    Raises:
        SystemExit: the run is over.
    """
    launched = LaunchEnvironment.from_environ(os.environ)
    if launched is not None and launched.rank:
        npu_zoo.simulate()
        create_engine(config)


def listen(host: str, port: int) -> socket.socket:
    """The TCP socket of a server.

    Args:
        host: a name or address of this machine.
        port: 0 takes one that is free.

    Raises:
        ConfigError: the host is none of this machine's, or the port needs a privilege.
        HardwareError: the port is in use; says by whom.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        every = address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=every)
    except (OSError, OverflowError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError | OverflowError | UnicodeError) -> NpuZooError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        users = ", ".join(map(str, port_users(port)))
        return HardwareError(f"port {port} of {host} is in use{users and f' by {users}'}; choose another one")
    # Python adds to the system's words which address it tried, a second time.
    reason = str(getattr(error, "strerror", None) or error).partition(" (while attempting")[0]
    return ConfigError(f"cannot listen on port {port} of '{host}': {reason}; name an address and port of this machine")


def _print(text: str) -> None:
    print(f"npu-zoo: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _private_directory() -> Iterator[Path]:
    """A directory of this user's alone, whose path leaves room for a socket's name."""
    folder = tempfile.mkdtemp(prefix="npu-zoo-")
    if len(folder) > _LONGEST_PATH:
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix="npu-zoo-", dir="/tmp")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _engine_listener(folder: Path) -> Iterator[socket.socket]:
    """The socket of all engines: a front end that comes before the engine waits in its queue."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / _SOCKET))
        listener.listen()
        yield listener
