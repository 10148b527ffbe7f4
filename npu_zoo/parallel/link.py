"""The line between a worker and the process that started it: what each tells the other, and the worker's end of it.

It is a pair of sockets that the worker inherits, so no port is open and nothing stands on the command line. The parent
sends one :class:`Setup` and later closes its writing side, which asks the worker to stop and happens by itself where
the parent dies. The worker sends the other messages. All are pickled; each side reads only what its own program wrote.
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
from collections.abc import Iterator
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
    """

    stage: str
    sent_at: float
    last_beat: float | None
    position: str


@dataclass(frozen=True)
class Ready:
    """The worker can take work."""


@dataclass(frozen=True)
class Done:
    """The worker's function returned."""


@dataclass(frozen=True)
class Failed:
    """The worker's function raised, or left by ``sys.exit``.

    Attributes:
        what: what happened, as the rest of a sentence that begins with the rank.
        stage: what the worker was doing.
        traceback: the error's last frames, its cause's first; empty for an error that is raised on purpose.
        at: when, as ``time.monotonic`` has it.
    """

    what: str
    stage: str
    traceback: str
    at: float


Message = Heartbeat | Ready | Done | Failed


class Link:
    """The worker's end. Its threads send heartbeats, and notice when the worker is to stop or its parent is gone.

    A worker at rest and one inside :meth:`working` are alive as long as their heartbeats arrive. From :meth:`beat` on,
    a step is under way: the loop has to call :meth:`beat` again, or :meth:`rest`, within the parent's ``hang_timeout``.

    Args:
        rank: the worker's.
        connection: the inherited socket.
        parent: the process that must stay alive.
        interval: seconds between two heartbeats.

    Attributes:
        stopping: set when the worker's function is to return.
    """

    def __init__(self, rank: int, connection: socket.socket, parent: int, interval: float) -> None:
        self.rank = rank
        self.stopping = threading.Event()
        self._connection = connection
        self._parent = parent
        self._interval = interval
        self._sending = threading.Lock()
        self._state: tuple[str, float | None] = ("starting", None)
        self._news = threading.Event()
        threading.Thread(target=self._send_heartbeats, name="heartbeats", daemon=True).start()
        threading.Thread(target=self._await_the_end, name="link", daemon=True).start()

    def beat(self, stage: str | None = None) -> None:
        """The loop got on and goes on; never waits.

        Args:
            stage: what it is at now, for messages about it; as before where None.
        """
        before, _ = self._state
        self._state = (before if stage is None else stage, time.monotonic())
        if stage not in (None, before):
            self._news.set()

    def rest(self) -> None:
        """No step is under way, and the loop waits for work; never waits itself."""
        self._state = (RESTING, None)
        self._news.set()

    @contextlib.contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """Long work without a loop, such as loading weights: a thread beats until the end of the block."""
        before, last_beat = self._state
        self._state = (stage, None)
        self._news.set()
        yield
        # Not after an error, since the message about it tells the stage.
        self._state = (before, None if last_beat is None else time.monotonic())

    def send_ready(self) -> None:
        """Tell the parent that the worker can take work, and rest."""
        self.rest()
        self._send(Ready())

    def send_done(self) -> None:
        """Tell the parent that the worker's function returned."""
        self._send(Done())

    def send_error(self, error: BaseException) -> None:
        """Tell the parent what left the worker's function."""
        self._send(describe_error(error, self._state[0]))

    def _send(self, message: Message) -> None:
        data = pickle.dumps(message)
        with self._sending, contextlib.suppress(OSError):  # the parent is gone or is ending this process
            self._connection.sendall(data)

    def _send_heartbeats(self) -> None:
        while os.getppid() == self._parent:
            stage, last_beat = self._state
            self._send(Heartbeat(stage, time.monotonic(), last_beat, _position_of_main_thread()))
            time.sleep(_SECONDS_BETWEEN_MESSAGES)
            self._news.wait(self._interval)
            self._news.clear()
        os.kill(os.getpid(), signal.SIGKILL)

    def _await_the_end(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.recv(1)
        self.stopping.set()  # a living parent ends this process itself, as gently as it can


def describe_error(error: BaseException, stage: str) -> Failed:
    """An error as text, since its class may not be importable in the parent, nor its arguments be picklable."""
    from npu_zoo.core.errors import NpuZooError

    at = time.monotonic()
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return Failed(f"exited with code {error.code or 0}", stage, "", at)
    try:
        what = f"raised {type(error).__name__}: {error}".rstrip(": ")
    except Exception:  # its __str__ is broken
        what = f"raised {type(error).__name__}"
    if isinstance(error, (NpuZooError, SystemExit)):
        return Failed(_shortened(what), stage, "", at)
    lines = traceback.format_exception(type(error), error, error.__traceback__, limit=-_FRAMES)
    return Failed(_shortened(what), stage, _shortened("".join(lines).rstrip()), at)


def _shortened(text: str) -> str:
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[: _MAX_TEXT // 2]}\n… {len(text) - _MAX_TEXT:,} characters …\n{text[-(_MAX_TEXT // 2) :]}"


def _position_of_main_thread() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
