"""The peers of one group together: which failure came first, and the end of all of them."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence

from npu_zoo.core.errors import EngineError, WorkerError
from npu_zoo.parallel.collectives import CollectiveTimeout, Missing
from npu_zoo.parallel.link import position_of_main_thread
from npu_zoo.parallel.peers import Failure, Peer

SETTLE_S = 0.25
"""How long further failures are waited for, since the first to be seen need not be the first that happened."""

_LONGEST_TICK = 0.25
_STANDSTILL = 1.0
_SECONDS_TO_REAP = 2.0
_SHARE_OF_ASKING = 2 / 3


class Supervisor:
    """Watches peers in a thread of its own, and ends them.

    Args:
        hang_timeout: seconds of silence that make a rank count as hanging.
        idle_is_hanging: whether a rank hangs that neither computes nor waits for others within a step.

    Attributes:
        peers: the ranks; those that are there before :meth:`start` is called.
        changed: notified of each of their changes.
        host: this one, as messages name it.
        failure: the first failure, once it is known.
        ending: whether the ranks are being ended or have ended.
        waiting: which collective operation rank 0 waits in, itself; None where nobody tells.
    """

    def __init__(self, hang_timeout: float, *, idle_is_hanging: bool = True) -> None:
        self.peers: list[Peer] = []
        self.changed = threading.Condition()
        self.failure: WorkerError | None = None
        self.ending = False
        self.waiting: Callable[[], str | None] | None = None
        self.host = socket.gethostname()
        self._hang_timeout = hang_timeout
        self._idle_is_hanging = idle_is_hanging
        self._owner = os.getpid()
        self._one_at_a_time = threading.RLock()

    def start(self) -> None:
        """Start the thread that watches the peers.

        Raises:
            EngineError: it cannot be started.
        """
        try:
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        except RuntimeError as error:
            raise self.start_error("the thread that watches the ranks", error) from error

    def wait_for(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until a condition over the children holds, at most ``timeout`` seconds; returns whether it does."""
        with self.changed:
            return self.changed.wait_for(condition, timeout)

    def error(self, failure: Failure, also: Sequence[Failure] = ()) -> WorkerError:
        """A failure as an error, with the ranks that are silent besides."""
        if failure.timed_out is not None:
            found = failure.timed_out
            missing = self.missing(found.ranks, own=True)
            return CollectiveTimeout(found.operation, found.timeout, found.ranks, missing)
        lines = [f"rank {failure.rank} on {failure.host} {failure.what}"]
        lines += [f"silent too: rank {other.rank} on {other.host} {other.what}" for other in also]
        return WorkerError("\n".join(lines), failure.rank, failure.host)

    def missing(self, ranks: Collection[int] = (), *, own: bool = False) -> list[Missing]:
        """The ranks that are in a step and do not wait for others, by their last heartbeats.

        Args:
            ranks: those to look at; empty for all.
            own: look at rank 0 too, which is there where it does not wait.
        """
        with self.changed:
            found = [peer.missing() for peer in self.peers]
        if own and self.waiting is not None and self.waiting() is None:
            found.insert(0, Missing(0, self.host, "its own work", position_of_main_thread()))
        return [missing for missing in found if missing and (not ranks or missing.rank in ranks)]

    def end(self, grace: float) -> None:
        """Ask all peers to stop, then SIGTERM, and after ``grace`` seconds SIGKILL; nothing where they ended before.

        An exception such as KeyboardInterrupt cuts the grace short, not the end.
        """
        if self.is_copy():
            return
        with self._one_at_a_time:
            with self.changed:
                self.ending = True
                self.changed.notify_all()
            for peer in self.peers:
                peer.ask()
            start = time.monotonic()
            try:
                if not self._wait_for_ends(start + grace * _SHARE_OF_ASKING):
                    self._signal(signal.SIGTERM)
                    self._wait_for_ends(start + grace)
            finally:
                self._signal(signal.SIGKILL)
                self._wait_for_ends(time.monotonic() + _SECONDS_TO_REAP)
                for peer in self.peers:
                    peer.release()

    def is_copy(self) -> bool:
        """Whether this process is a copy by fork of the one that has the peers."""
        return os.getpid() != self._owner

    def start_error(self, what: str, error: Exception) -> EngineError:
        """Why a process or thread cannot be started, as an error."""
        return EngineError(
            f"cannot start {what} on {self.host}: {error}; "
            "look at the limits (ulimit -u, ulimit -n) and at the memory that is free"
        )

    def _wait_for_ends(self, deadline: float) -> bool:
        return self.wait_for(lambda: all(peer.ended for peer in self.peers), max(0, deadline - time.monotonic()))

    def _signal(self, number: signal.Signals) -> None:
        for peer in self.peers:
            peer.send_signal(number)

    def _watch(self) -> None:
        tick = min(_LONGEST_TICK, self._hang_timeout / 4)
        last = time.monotonic()
        while True:
            with self.changed:
                self.changed.wait_for(self._has_news, tick)
                last = self._forgive_a_standstill(last, tick)
                if self._failures():
                    self.changed.wait_for(lambda: self.ending, SETTLE_S)
                    self._settle(self._failures())  # anew, since a silent rank may have got on
                if self.ending or self.failure:
                    return

    def _settle(self, failures: Sequence[Failure]) -> None:
        if failures:
            self.failure = self._first(failures)
            self.changed.notify_all()

    def _has_news(self) -> bool:
        return self.ending or any(peer.failure for peer in self.peers)

    def _forgive_a_standstill(self, last: float, tick: float) -> float:
        now = time.monotonic()
        if now - last > tick + _STANDSTILL:  # this process was stopped, or starved, and heard nobody
            for peer in self.peers:
                peer.forgive(now)
        return now

    def _failures(self) -> list[Failure]:
        now = time.monotonic()
        found = [peer.failure for peer in self.peers]
        if not self.ending:
            found += [self._silence(peer, now) for peer in self.peers if not peer.failure]
        return [failure for failure in found if failure]

    def _silence(self, peer: Peer, now: float) -> Failure | None:
        return peer.silence(now, self._hang_timeout, idle_is_hanging=self._idle_is_hanging)

    def _first(self, failures: Sequence[Failure]) -> WorkerError:
        # A neighbour may raise, for its lost connection, before the end of a killed rank is noticed.
        first, *others = sorted(failures, key=lambda failure: failure.at - SETTLE_S * failure.sudden)
        return self.error(first, [other for other in others if first.silent and other.silent])
