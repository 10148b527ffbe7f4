"""The line between a rank and rank 0's process, which supervises it: what each tells the other, and the rank's end.

Between a worker and the process that started it, it is a pair of sockets that the worker inherits, so no port is open
and nothing stands on the command line. The parent sends one :class:`Setup` and later closes its writing side, which
asks the worker to stop and happens by itself where the parent dies. The worker sends the other messages. All are
pickled; each side reads only what its own program wrote. Ranks that somebody else started have a line of their own,
:mod:`npu_zoo.parallel.launched`, with the same messages.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

RESTING = "waiting for work"
_SECONDS_BETWEEN_MESSAGES = 0.05
_FRAMES = 12
_MAX_TEXT = 8_000


@dataclass(frozen=True)
class Setup:
    """What a worker is started with.

    Attributes:
        target: the function as ``package.module:function``.
        payload: its first argument, pickled.
        sys_path: where the parent imports from.
        pythonpath: ``PYTHONPATH`` as the worker's own children are to see it; None where unset.
        interval: seconds between two heartbeats.
    """

    rank: int
    target: str
    payload: bytes
    sys_path: tuple[str, ...]
    pythonpath: str | None
    interval: float


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life. Times are those of ``time.monotonic``, which all processes of a host share.

    Attributes:
        stage: what the worker is doing.
        sent_at: when this was sent.
        last_beat: when the worker's loop last got on; None where nobody waits for it.
        position: the line that the worker's main thread is at.
        cpu_time: seconds of all its CPUs that the process used so far, but for sending these.
        main_cpu_time: those of its main thread.
        steps: how many steps it has begun.
        stepping: whether it is inside one.
        waiting: the collective operation that it waits in for other ranks, such as ``all_reduce of group tp``.
    """

    stage: str
    sent_at: float
    last_beat: float | None
    position: str
    cpu_time: float = 0.0
    main_cpu_time: float = 0.0
    steps: int = 0
    stepping: bool = False
    waiting: str | None = None


@dataclass(frozen=True)
class Ready:
    """The worker can take work."""


@dataclass(frozen=True)
class Done:
    """The worker's function returned."""


@dataclass(frozen=True)
class TimedOut:
    """A collective operation that was not done in time.

    Attributes:
        operation: such as ``all_reduce of group tp``.
        timeout: seconds.
        ranks: those of the group; empty for all.
    """

    operation: str
    timeout: float
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The worker's function raised, or left by ``sys.exit``.

    Attributes:
        what: what happened, as the rest of a sentence that begins with the rank.
        stage: what the worker was doing.
        traceback: the error's last frames, its cause's first; empty for an error that is raised on purpose.
        at: when, as ``time.monotonic`` has it.
        timed_out: the collective operation that was not done in time, where that was the error.
    """

    what: str
    stage: str
    traceback: str
    at: float
    timed_out: TimedOut | None = None


Message = Heartbeat | Ready | Done | Failed


@dataclass(frozen=True)
class _State:
    stage: str = "starting"
    last_beat: float | None = None
    stepping: bool = False


class Link:
    """A rank's end. Its threads send heartbeats, and notice when the rank is to stop or rank 0's process is gone.

    A rank at rest and one inside :meth:`working` are alive as long as their heartbeats arrive. One inside
    :meth:`stepping` has to use its CPU or to wait for others besides. From :meth:`beat` on, a loop is under way: it has
    to call :meth:`beat` again, or :meth:`rest`, within the ``hang_timeout`` of who supervises it.

    Args:
        rank: this one.
        connection: to rank 0's process.
        interval: seconds between two heartbeats.

    Attributes:
        stopping: set when the rank's function is to return.
        waiting: tells from any thread which collective operation the main thread waits in, if any; for the engine to
            replace.
    """

    def __init__(self, rank: int, connection: socket.socket, interval: float) -> None:
        self.rank = rank
        self.stopping = threading.Event()
        self.waiting: Callable[[], str | None] = _no_operation
        self._connection = connection
        self._interval = interval
        self._sending = threading.Lock()
        self._state = _State()
        self._steps = 0
        self._news = threading.Event()
        self._closed = threading.Event()
        threading.Thread(target=self._send_heartbeats, name="heartbeats", daemon=True).start()
        threading.Thread(target=self._await_the_end, name="link", daemon=True).start()

    def beat(self, stage: str | None = None) -> None:
        """The loop got on and goes on; never waits.

        Args:
            stage: what it is at now, for messages about it; as before where None.
        """
        before = self._state.stage
        self._state = _State(before if stage is None else stage, time.monotonic())
        if stage not in (None, before):
            self._news.set()

    def rest(self) -> None:
        """No step is under way, and the loop waits for work; never waits itself."""
        self._state = _State(RESTING)
        self._news.set()

    @contextlib.contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """Long work without a loop, such as loading weights: a thread beats until the end of the block."""
        with self._being(_State(stage)):
            self._news.set()
            yield

    @contextlib.contextmanager
    def stepping(self, stage: str) -> Iterator[None]:
        """A step: work that uses the CPU all the time, but where :attr:`waiting` names an operation."""
        self._steps += 1
        with self._being(_State(stage, stepping=True)):
            yield

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell rank 0 how the block ends, and close the link; an error is raised on."""
        try:
            yield
        except BaseException as error:
            self.send_error(error)
            raise
        else:
            self.send_done()
        finally:
            self.close()

    def send_ready(self) -> None:
        """Tell rank 0 that this rank can take work, and rest."""
        self.rest()
        self._send(Ready())

    def send_done(self) -> None:
        """Tell rank 0 that this rank's function returned."""
        self._send(Done())

    def send_error(self, error: BaseException) -> None:
        """Tell rank 0 what left this rank's function."""
        self._send(describe_error(error, self._state.stage))

    def close(self) -> None:
        """Nothing more is told, and the end of rank 0 no longer matters."""
        self._closed.set()
        self._news.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _being(self, state: _State) -> Iterator[None]:
        before, self._state = self._state, state
        yield
        # Not after an error, since the message about it tells the stage.
        last_beat = None if before.last_beat is None else time.monotonic()
        self._state = _State(before.stage, last_beat, before.stepping)

    def _send(self, message: Message) -> None:
        data = pickle.dumps(message)
        with self._sending, contextlib.suppress(OSError):  # rank 0 is gone or is ending this process
            self._connection.sendall(data)

    def _send_heartbeats(self) -> None:
        while not self._closed.is_set():
            self._require_supervisor()
            self._send_heartbeat(self._heartbeat())
            time.sleep(_SECONDS_BETWEEN_MESSAGES)
            self._news.wait(self._interval)
            self._news.clear()

    def _send_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._send(heartbeat)

    def _heartbeat(self) -> Heartbeat:
        state = self._state
        return Heartbeat(
            state.stage,
            time.monotonic(),
            state.last_beat,
            position_of_main_thread(),
            cpu_time=time.process_time() - time.thread_time(),
            main_cpu_time=_cpu_time_of_main_thread(),
            steps=self._steps,
            stepping=state.stepping,
            waiting=self.waiting(),
        )

    def _require_supervisor(self) -> None:
        """End this process where nobody watches it any more and the connection does not tell."""

    def _await_the_end(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.recv(1)
        self.stopping.set()  # a living parent ends this process itself, as gently as it can


class WorkerLink(Link):
    """The end of a worker, whose parent must stay alive.

    Args:
        parent: the process.
    """

    def __init__(self, rank: int, connection: socket.socket, parent: int, interval: float) -> None:
        self._parent = parent
        super().__init__(rank, connection, interval)

    def _require_supervisor(self) -> None:
        if os.getppid() != self._parent:
            os.kill(os.getpid(), signal.SIGKILL)


def describe_error(error: BaseException, stage: str) -> Failed:
    """An error as text, since its class may not be importable in the parent, nor its arguments be picklable."""
    from npu_zoo.core.errors import NpuZooError
    from npu_zoo.parallel.collectives import CollectiveTimeout

    at = time.monotonic()
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return Failed(f"exited with code {error.code or 0}", stage, "", at)
    try:
        what = f"raised {type(error).__name__}: {error}".rstrip(": ")
    except Exception:  # its __str__ is broken
        what = f"raised {type(error).__name__}"
    if isinstance(error, CollectiveTimeout):
        return Failed(_shortened(what), stage, "", at, TimedOut(error.operation, error.timeout, error.ranks))
    if isinstance(error, (NpuZooError, SystemExit)):
        return Failed(_shortened(what), stage, "", at)
    lines = traceback.format_exception(type(error), error, error.__traceback__, limit=-_FRAMES)
    return Failed(_shortened(what), stage, _shortened("".join(lines).rstrip()), at)


def _shortened(text: str) -> str:
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[: _MAX_TEXT // 2]}\n… {len(text) - _MAX_TEXT:,} characters …\n{text[-(_MAX_TEXT // 2) :]}"


def position_of_main_thread() -> str:
    """The line that this process's main thread is at, such as ``model.py:12 in forward``."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _cpu_time_of_main_thread() -> float:
    """Seconds; where a thread's clock cannot be read, those of the process."""
    clock_id = getattr(time, "pthread_getcpuclockid", None)
    ident = threading.main_thread().ident
    return time.clock_gettime(clock_id(ident)) if clock_id and ident else time.process_time()


def _no_operation() -> None:
    """Nothing is waited for."""
