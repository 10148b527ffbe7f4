"""Supervision of ranks that somebody else started, such as torchrun, on this host or on others, over TCP.

Rank 0's process makes a :class:`LaunchedGroup`, each other one a :func:`launched_link`; both are used as a
:class:`~npu_zoo.parallel.processes.WorkerGroup` and its workers' links are. Where rank 0's process or its host is
gone, the others end within ten seconds, wherever they are; where it is only stopped, they wait.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import time
import weakref
from datetime import timedelta
from typing import Any

from npu_zoo.core.errors import EngineError
from npu_zoo.parallel.addresses import local_address
from npu_zoo.parallel.children import describe_end
from npu_zoo.parallel.environment import LaunchEnvironment
from npu_zoo.parallel.joining import (
    FAILED,
    HEARD,
    KILL,
    STOP,
    TERMINATE,
    WELCOME,
    Meeting,
    Reception,
    Store,
    find_supervisor,
    read_pickles,
)
from npu_zoo.parallel.link import Done, Failed, Heartbeat, Link, Ready
from npu_zoo.parallel.peers import Failure, Peer
from npu_zoo.parallel.signals import act_on_signals
from npu_zoo.parallel.supervised import GRACE_S, HANG_TIMEOUT_S, SupervisedRanks, heartbeat_interval
from npu_zoo.parallel.supervision import Supervisor

NOT_JOINED = "not joined yet, or not started by its launcher"
JOIN_TIMEOUT_S = 300.0
_MOST_UNHEARD = 16
"""Heartbeats on their way; with more, those to a stopped rank 0 would fill the connection and fail it."""

_SECONDS_TO_LEAVE = 5.0
_SECONDS_FOR_RANK_0 = 5.0
_SECONDS_TO_BE_HEARD = 1.0


class LaunchedPeer(Peer):
    """A rank that connects by itself."""

    unheard = "stopped, has locked its interpreter, or its host is out of reach"

    def __init__(self, rank: int, changed: threading.Condition, failed: threading.Event) -> None:
        super().__init__(rank, "", NOT_JOINED, changed)
        self._failed = failed
        self._connection: socket.socket | None = None
        self._offset = float("inf")

    def join(self, host: str, connection: socket.socket) -> bool:
        """Take the rank's connection and hear it to its end; returns whether the rank was expected."""
        with self._changed:
            if self._connection is not None or self._asked:
                return False
            self._connection, self.host = connection, host
            self._heard_at = time.monotonic()
            self._first_stage = "joining"
            self._changed.notify_all()
        self._say(WELCOME)
        self._conclude(read_pickles(connection, self._take_in))
        return True

    def ask(self) -> None:
        """Ask the rank to stop: from now on its end is no failure."""
        with self._changed:
            self._asked = True
            if self._connection is None:
                self.ended = True
            self._changed.notify_all()
        self._say(FAILED if self._failed.is_set() else STOP)

    def send_signal(self, number: signal.Signals) -> None:
        """Have the rank's process send itself the signal."""
        self._say(KILL if number == signal.SIGKILL else TERMINATE)

    def release(self) -> None:
        """Close the connection."""
        super().release()
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def _say(self, word: bytes) -> None:
        if self._connection is not None and not self.ended:
            with contextlib.suppress(OSError):
                self._connection.send(word, socket.MSG_DONTWAIT)

    def _take_in(self, message: object) -> None:
        if isinstance(message, Heartbeat):
            self._offset = min(self._offset, time.monotonic() - message.sent_at)  # the least delay is nearest to none
            self._say(HEARD)
        if isinstance(message, (Heartbeat, Ready, Done, Failed)):
            self._hear(message)

    def _local_time(self, at: float) -> float:
        return min(at + self._offset, time.monotonic())

    def _conclude(self, error: Exception) -> None:
        with self._changed:
            if not self.done:
                self._fail(Failure(self.rank, time.monotonic(), self._describe(error), self.host, sudden=True))
            self.ended = True
            self._changed.notify_all()
        if self._connection is not None:
            self._connection.close()

    def _describe(self, error: Exception) -> str:
        if isinstance(error, (EOFError, ConnectionError)):
            return f"ended without a word, perhaps killed for memory: see dmesg on its host, at '{self.stage}'"
        if isinstance(error, OSError):
            return f"is out of reach ({error.strerror}): its host or the network is down, at '{self.stage}'"
        return f"sent what is no message ({type(error).__name__}: {error}), at '{self.stage}'"


class LaunchedGroup(SupervisedRanks):
    """The ranks beside rank 0 where a launcher started all of them. It supervises those on all hosts.

    Args:
        store: shared by all ranks, see :func:`join_store`.
        environment: this process's place, which is rank 0's.
        hang_timeout: seconds without a heartbeat, or idle within one step, after which a rank counts as hanging.
        idle_is_hanging: whether a rank hangs too that neither computes nor waits for others within a step; False where
            steps run on a device, which is waited for without a CPU.

    Attributes:
        address: this host's, as the others reach it.
        attempt: a name for this start of the ranks, alike on all of them and new after a restart; to prefix keys with.

    Raises:
        HardwareError: this host has no address that the others reach.
        EngineError: a thread or socket cannot be had.
    """

    def __init__(
        self,
        store: Store,
        environment: LaunchEnvironment,
        *,
        hang_timeout: float = HANG_TIMEOUT_S,
        idle_is_hanging: bool = True,
    ) -> None:
        supervisor = Supervisor(hang_timeout, idle_is_hanging=idle_is_hanging)
        super().__init__(supervisor)
        self._failed = threading.Event()
        peers = [LaunchedPeer(rank, supervisor.changed, self._failed) for rank in range(1, environment.world_size)]
        supervisor.peers += peers
        self.address = local_address(environment.master_addr, environment.num_nodes)
        by_rank = {peer.rank: peer for peer in peers}

        def admit(rank: int, host: str, connection: socket.socket) -> bool:
            return rank in by_rank and by_rank[rank].join(host, connection)

        try:
            reception = Reception(store, self.address, admit)
        except (OSError, RuntimeError) as error:
            raise supervisor.start_error("the supervision of the other ranks", error) from error
        self.attempt = reception.meeting.attempt
        self._finalizer = weakref.finalize(self, _end, supervisor, reception, self._failed, GRACE_S)
        self._reception = reception
        try:
            supervisor.start()
        except BaseException:
            self.shutdown(0)
            raise

    @property
    def hosts(self) -> dict[int, str]:
        """Where the ranks run that have joined, by rank."""
        return {peer.rank: peer.host for peer in self._supervisor.peers if peer.host}

    def shutdown(self, grace: float = GRACE_S, *, failed: bool = False) -> None:
        """End all ranks: ask them, then by SIGTERM, and after ``grace`` seconds by SIGKILL. Again, it does nothing.

        Args:
            grace: seconds.
            failed: whether the run has failed, for the others' exit codes; a rank's failure is known without it.
        """
        if failed:
            self._failed.set()
        _end(self._supervisor, self._reception, self._failed, grace)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.shutdown(failed=error is not None)


def _end(supervisor: Supervisor, reception: Reception, failed: threading.Event, grace: float) -> None:
    if supervisor.is_copy():
        return
    if supervisor.failure is not None:
        failed.set()
    reception.close()
    supervisor.end(grace)


class LaunchedLink(Link):
    """The end of a rank that a launcher started.

    Args:
        rank: this one.
        connection: to rank 0's process.
        meeting: where that is.
        address: this host's, as the others reach it.
        interval: seconds between two heartbeats.

    Attributes:
        address: see above.
        attempt: see :class:`LaunchedGroup`.
        failed: whether rank 0 told that the run has failed; for the exit code.
    """

    def __init__(self, rank: int, connection: socket.socket, meeting: Meeting, address: str, interval: float) -> None:
        self.address = address
        self.attempt = meeting.attempt
        self.failed = False
        self._meeting = meeting
        self._unheard = 0
        super().__init__(rank, connection, interval)

    def send_error(self, error: BaseException) -> None:
        """Tell rank 0 what left this rank's function, and let it end first: launchers end all once one has ended."""
        super().send_error(error)
        self.stopping.wait(_SECONDS_FOR_RANK_0)

    def leave(self, number: signal.Signals) -> None:
        """End this process for a signal, and tell rank 0; a Ctrl-C is left to rank 0 for a while, which may have it."""
        asked = self.stopping.wait(_SECONDS_FOR_RANK_0) if number == signal.SIGINT else self.stopping.is_set()
        if not asked:
            self._send(Failed(describe_end(-number), self._state.stage, "", time.monotonic()))
            self.stopping.wait(_SECONDS_TO_BE_HEARD)
        elif number == signal.SIGINT:
            return
        os._exit(128 + number)

    def _send_heartbeat(self, heartbeat: Heartbeat) -> None:
        if self._unheard < _MOST_UNHEARD:
            self._unheard += 1
            self._send(heartbeat)

    def _await_the_end(self) -> None:
        why = "its process ended"
        try:
            while words := self._connection.recv(256):
                for word in words:
                    self._obey(bytes([word]))
        except OSError as error:
            why = why if isinstance(error, ConnectionError) else f"its host is out of reach: {error.strerror}"
        if self.stopping.is_set():  # a main thread that does not hear it is not waited for
            if not self._closed.wait(_SECONDS_TO_LEAVE):
                self._tell_and_leave("")
        elif not self._closed.is_set():
            self._tell_and_leave(f"rank {self.rank} ends: rank 0 on {self._meeting.host} is gone ({why})")

    def _obey(self, word: bytes) -> None:
        if word == HEARD:
            self._unheard = 0
        elif word in (STOP, FAILED):
            self.failed = word == FAILED
            self.stopping.set()
        elif word == TERMINATE:
            os.kill(os.getpid(), signal.SIGTERM)
        elif word == KILL:
            self._tell_and_leave("")

    def _tell_and_leave(self, line: str) -> None:
        if line and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), f"{line}\n".encode())
        os._exit(1)


def launched_link(
    store: Store,
    environment: LaunchEnvironment,
    *,
    hang_timeout: float = HANG_TIMEOUT_S,
    timeout: float = JOIN_TIMEOUT_S,
) -> LaunchedLink:
    """Join the ranks that rank 0's :class:`LaunchedGroup` supervises.

    From now on SIGTERM ends this process at once, and a Ctrl-C where rank 0 does not end the run, as it has its own.

    Args:
        store: shared by all ranks, see :func:`join_store`.
        environment: this process's place, which is not rank 0's.
        hang_timeout: rank 0's.
        timeout: seconds to wait for rank 0.

    Raises:
        WorkerError: rank 0 was not found in time.
        HardwareError: this host has no address that the others reach.
    """
    address = local_address(environment.master_addr, environment.num_nodes)
    connection, meeting = find_supervisor(store, environment.rank, environment.master_addr, timeout)
    link = LaunchedLink(environment.rank, connection, meeting, address, heartbeat_interval(hang_timeout))
    act_on_signals([signal.SIGTERM, signal.SIGINT], link.leave)
    return link


def join_store(environment: LaunchEnvironment, timeout: float = JOIN_TIMEOUT_S) -> Any:
    """The store that all ranks of a launcher share; waits for all of them.

    It is the launcher's own where that offers one, as torchrun's agents do. Keys may be left from before a restart.

    Args:
        environment: this process's place.
        timeout: seconds.

    Raises:
        EngineError: not all ranks came in time, or the port of the store is taken.
    """
    distributed: Any = importlib.import_module("torch.distributed")
    rank, size = environment.rank, environment.world_size
    try:
        store, _, _ = next(distributed.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
    except (RuntimeError, ValueError) as error:
        where = f"{environment.master_addr}:{environment.master_port}"
        reason = str(error).partition("\n")[0]
        raise EngineError(
            f"rank {rank} of {size} did not meet the others at {where} in {timeout:g} s: {reason}"
        ) from error
    return store
