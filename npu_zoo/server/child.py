"""A process of the server: how the supervisor starts it, hears it and knows its end, and the process's own program.

The supervisor and the process share a pair of sockets. The process hears on it what it is to run, tells the supervisor
what its end is due to, and ends at once where the supervisor is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_zoo.core.errors import NpuZooError
from npu_zoo.parallel.worker import die_with_parent
from npu_zoo.registry import load_code
from npu_zoo.server.channel import Channel, ChannelClosed, OnMessages, read_frame
from npu_zoo.server.messages import Failed, portable_error

_SECONDS_FOR_LAST_WORDS = 5.0


@dataclass(frozen=True)
class ChildSetup:
    """What a process is to run.

    Attributes:
        target: ``package.module:function``, called with the payload and the process's :class:`Channel`.
        payload: pickled.
        sys_path: where the supervisor imports from.
        pythonpath: ``PYTHONPATH`` as the supervisor has it; None where unset.
    """

    target: str
    payload: bytes
    sys_path: tuple[str, ...]
    pythonpath: str | None


class ChildProcess:
    """A process that runs, in a session of its own.

    It is started by the thread that makes this object, and Linux ends it with that thread.

    Args:
        name: for messages.
        target, payload: see :class:`ChildSetup`.
        descriptors: that it inherits, under the same numbers.
        on_messages: called with what it tells, from a thread of its own.
        on_exit: called with its exit status after all that it told, from a thread of its own.

    Raises:
        OSError: it cannot be started.

    Attributes:
        pid: its number, which is no other process's until ``on_exit`` is called.
    """

    def __init__(
        self,
        name: str,
        target: str,
        payload: Any,
        descriptors: Collection[int],
        on_messages: OnMessages,
        on_exit: Callable[[int], None],
    ) -> None:
        path = tuple(entry or str(Path.cwd()) for entry in sys.path)
        setup = ChildSetup(target, pickle.dumps(payload), path, os.environ.get("PYTHONPATH"))
        self._name, self._on_exit = name, on_exit
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn(name, theirs.fileno(), descriptors, path)
        self.pid = self._process.pid
        self._channel = Channel(ours, name, on_messages, _nothing)
        self._channel.start()
        self._channel.send(setup)
        threading.Thread(target=self._await_exit, name=f"end of {name}", daemon=True).start()

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing where it has ended."""
        self._process.send_signal(number)

    def _await_exit(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self._channel.close()  # what it said last can still be read
        self._channel.join()
        self._on_exit(self._process.wait())


def _spawn(name: str, control: int, descriptors: Collection[int], path: Sequence[str]) -> subprocess.Popen[bytes]:
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []  # the working directory is not where to import from
    return subprocess.Popen(
        [sys.executable, *safe_path, "-m", "npu_zoo.server.child", name, str(control), str(os.getpid())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdin=subprocess.DEVNULL,
        pass_fds=[control, *descriptors],
        start_new_session=True,  # out of reach of the terminal's Ctrl-C
    )


def _nothing() -> None:
    """That a process has closed its end says nothing; its exit does."""


def main(arguments: Sequence[str]) -> int:
    """Run a process of the server to its end.

    Args:
        arguments: a name for who lists processes, the descriptor of the inherited socket, the supervisor's process.

    Returns:
        The exit code: 0 where the function returned, else that of its error, which the supervisor has been told.
    """
    descriptor, supervisor = map(int, arguments[1:])
    die_with_parent(supervisor)
    os.set_inheritable(descriptor, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides what a Ctrl-C means
    connection = socket.socket(fileno=descriptor)
    try:
        with connection.makefile("rb") as stream:
            (setup,) = read_frame(stream.read)
    except EOFError:
        return 0
    _import_as_the_supervisor(setup)
    control = Channel(connection, "the supervisor", _ignore, _end_at_once)
    control.start()
    try:
        load_code(setup.target)(pickle.loads(setup.payload), control)
    except Exception as error:
        return _report(error, control)
    return 0


def _import_as_the_supervisor(setup: ChildSetup) -> None:
    sys.path[:] = setup.sys_path
    if setup.pythonpath is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = setup.pythonpath


def _report(error: Exception, control: Channel) -> int:
    on_purpose = isinstance(error, NpuZooError)
    if not on_purpose:
        traceback.print_exception(error)
    found = portable_error(error)
    with contextlib.suppress(ChannelClosed):
        control.send(Failed(found, on_purpose))
        control.flush(_SECONDS_FOR_LAST_WORDS)
    return found.exit_code


def _ignore(messages: Sequence[object]) -> None:
    """The supervisor says nothing after the setup."""


def _end_at_once() -> None:
    """Where the system has no signal for the parent's end, the connection tells it."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
