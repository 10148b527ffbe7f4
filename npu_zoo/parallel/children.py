"""One worker as its parent sees it: started, heard, judged and reaped by a thread of its own.

The thread that starts a worker lives as long as the worker, because Linux ends a process with its parent's *thread*
(prctl(2), PR_SET_PDEATHSIG), and the caller of an engine may well be a thread that ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from npu_zoo.parallel.link import Message, Setup
from npu_zoo.parallel.peers import Failure, Peer

NOT_HEARD = "starting its interpreter"
_SUDDEN = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_SECONDS_FOR_DESCENDANTS = 1.0
_SECONDS_BETWEEN_LOOKS = 0.02


class Child(Peer):
    """A worker's process.

    Args:
        setup: what it is started with.
        environ: its whole environment.
        changed: shared by the children of a group.

    Attributes:
        start_error: why it could not be started.
    """

    def __init__(self, setup: Setup, environ: Mapping[str, str], changed: threading.Condition) -> None:
        super().__init__(setup.rank, socket.gethostname(), NOT_HEARD, changed)
        self.start_error: Exception | None = None
        self._setup: Setup | None = setup
        self._environ = environ
        self._pid: int | None = None
        self._socket, self._theirs = socket.socketpair()
        self._gone_at = math.inf
        self._thread = threading.Thread(target=self._keep, name=f"rank {self.rank}", daemon=True)

    def start(self) -> None:
        """Begin to start the process; ``pid`` or ``start_error`` is set soon after."""
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread can be started
            self._close(error)

    @property
    def pid(self) -> int | None:
        """The process while it lives or is a zombie of ours."""
        return self._pid

    def ask(self) -> None:
        """Ask the worker to stop: from now on its end is no failure."""
        with self._changed:
            self._asked = True
        if self._thread.ident is None:
            self._close(None)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def send_signal(self, number: signal.Signals) -> None:
        """Send the process a signal; nothing where it has ended."""
        with self._changed:
            if self._pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, number)

    def _keep(self) -> None:
        hearing = threading.Thread(target=self._converse, name=f"link to rank {self.rank}", daemon=True)
        try:
            process = self._spawn()
            _start_or_kill(hearing, process)
        except Exception as error:  # OSError, no memory for the fork, or no room for a thread
            self._close(error)
            return
        with self._changed:
            self._pid = process.pid
            self._changed.notify_all()
        self._await_exit(process.pid)
        hearing.join()
        _end_descendants(process.pid)
        with self._changed:  # from here on the number may be another process's
            self._pid = None
        self._conclude(process.wait())
        self._close(None)

    def _spawn(self) -> subprocess.Popen[bytes]:
        safe_path = ["-P"] if sys.version_info >= (3, 11) else []  # the working directory is not where to import from
        arguments = ["-m", "npu_zoo.parallel.worker", str(self._theirs.fileno()), str(os.getpid())]
        try:
            return subprocess.Popen(
                [sys.executable, *safe_path, *arguments],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                pass_fds=[self._theirs.fileno()],
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
        finally:
            self._theirs.close()

    def _converse(self) -> None:
        """Give the worker its setup and hear it until the link is closed."""
        with contextlib.suppress(OSError):
            self._socket.sendall(pickle.dumps(self._setup))
        self._setup = None  # a payload may be large
        with self._socket.makefile("rb") as stream, contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                self._hear(read_message(stream))
        self._gone_at = min(self._gone_at, time.monotonic())

    def _await_exit(self, pid: int) -> None:
        """Wait for the process to become a zombie; what it said last can still be read then."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._gone_at = min(self._gone_at, time.monotonic())
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # a process of the worker's may hold its end open

    def _conclude(self, code: int) -> None:
        with self._changed:
            if code or not self.done:
                what = f"{describe_end(code)}, at '{self.stage}'"
                self._fail(Failure(self.rank, self._gone_at, what, self.host, sudden=-code in _SUDDEN))

    def _close(self, error: Exception | None) -> None:
        with self._changed:
            self.start_error = error
            self._socket.close()
            self._theirs.close()
            self.ended = True
            self._changed.notify_all()


def describe_end(code: int) -> str:
    """An exit status as the rest of a sentence; negative ones are signals, as subprocess has it."""
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code == signal.SIGKILL:
        return f"was killed ({name}), perhaps for memory: see dmesg"
    return f"was ended by {name} ({(signal.strsignal(-code) or 'a signal').lower()})"


def session_members(leader: int) -> list[int]:
    """The living processes of a session without its leader; none where there is no /proc."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, _, _, session = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                members.append(int(path.parent.name))
    return [member for member in members if member != leader]


def _end_descendants(leader: int) -> None:
    """End what a worker left behind; its zombie keeps the session's number from being used anew meanwhile."""
    deadline = time.monotonic() + _SECONDS_FOR_DESCENDANTS
    while (members := session_members(leader)) and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)  # such as the tracker that removes shared memory once the worker is gone
    for member in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def _start_or_kill(thread: threading.Thread, process: subprocess.Popen[bytes]) -> None:
    try:
        thread.start()
    except RuntimeError:
        process.kill()
        process.wait()
        raise


def read_message(stream: IO[bytes]) -> Message:
    """The next message of a rank that is trusted; raises what unpickling raises, and EOFError at the end."""
    message: Message = pickle.load(stream)
    return message
