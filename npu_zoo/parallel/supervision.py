"""The children of one group together: which failure came first, and the end of all of them."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from npu_zoo.core.errors import EngineError, WorkerError
from npu_zoo.parallel.children import Child, Failure
from npu_zoo.parallel.link import Setup

SETTLE_S = 0.25
"""How long further failures are waited for, since the first to be seen need not be the first that happened."""

_LONGEST_TICK = 0.25
_STANDSTILL = 1.0
_SECONDS_TO_REAP = 2.0
_SHARE_OF_ASKING = 2 / 3


class Supervisor:
    """Starts children, watches them in a thread of its own, and ends them.

    Args:
        setups: one per child.
        environs: their whole environments.
        hang_timeout: seconds of silence that make a rank count as hanging.

    Attributes:
        children: those that were begun to be started.
        changed: notified of each of their changes.
        host: this one, as messages name it.
        failure: the first failure, once it is known.
        ending: whether the children are being ended or have ended.
    """

    def __init__(self, setups: Sequence[Setup], environs: Sequence[Mapping[str, str]], hang_timeout: float) -> None:
        self.children: list[Child] = []
        self.changed = threading.Condition()
        self.failure: WorkerError | None = None
        self.ending = False
        self._starts = list(zip(setups, environs, strict=True))
        self._hang_timeout = hang_timeout
        self.host = socket.gethostname()
        self._owner = os.getpid()
        self._one_at_a_time = threading.RLock()

    def start(self) -> None:
        """Start all children and the thread that watches them.

        Raises:
            EngineError: a process or thread cannot be started.
        """
        while self._starts:
            setup, environ = self._starts.pop(0)
            try:
                child = Child(setup, environ, self.changed)
            except OSError as error:
                raise self._start_error(f"the process of rank {setup.rank}", error) from error
            self.children.append(child)
            child.start()
        self.wait_for(lambda: all(child.pid or child.ended for child in self.children))
        for child in self.children:
            if child.start_error is not None:
                raise self._start_error(f"the process of rank {child.rank}", child.start_error) from child.start_error
        try:
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        except RuntimeError as error:
            raise self._start_error("the thread that watches the ranks", error) from error

    def wait_for(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until a condition over the children holds, at most ``timeout`` seconds; returns whether it does."""
        with self.changed:
            return self.changed.wait_for(condition, timeout)

    def error(self, failure: Failure, also: Sequence[Failure] = ()) -> WorkerError:
        """A failure as an error, with the ranks that are silent besides."""
        lines = [f"rank {failure.rank} on {self.host} {failure.what}"]
        lines += [f"silent too: rank {other.rank} {other.what}" for other in also]
        return WorkerError("\n".join(lines), failure.rank, self.host)

    def end(self, grace: float) -> None:
        """Ask all children to stop, then SIGTERM, and after ``grace`` seconds SIGKILL; nothing where they ended before.

        An exception such as KeyboardInterrupt cuts the grace short, not the end.
        """
        if os.getpid() != self._owner:  # a copy by fork has no children
            return
        with self._one_at_a_time:
            with self.changed:
                self.ending = True
                self.changed.notify_all()
            for child in self.children:
                child.ask()
            start = time.monotonic()
            try:
                if not self._wait_for_ends(start + grace * _SHARE_OF_ASKING):
                    self._signal(signal.SIGTERM)
                    self._wait_for_ends(start + grace)
            finally:
                self._signal(signal.SIGKILL)
                self._wait_for_ends(time.monotonic() + _SECONDS_TO_REAP)

    def _start_error(self, what: str, error: Exception) -> EngineError:
        return EngineError(
            f"cannot start {what} on {self.host}: {error}; "
            "look at the limits (ulimit -u, ulimit -n) and at the memory that is free"
        )

    def _wait_for_ends(self, deadline: float) -> bool:
        return self.wait_for(lambda: all(child.ended for child in self.children), max(0, deadline - time.monotonic()))

    def _signal(self, number: signal.Signals) -> None:
        for child in self.children:
            child.send_signal(number)

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
        return self.ending or any(child.failure for child in self.children)

    def _forgive_a_standstill(self, last: float, tick: float) -> float:
        now = time.monotonic()
        if now - last > tick + _STANDSTILL:  # this process was stopped, or starved, and heard nobody
            for child in self.children:
                child.forgive(now)
        return now

    def _failures(self) -> list[Failure]:
        now = time.monotonic()
        found = [child.failure for child in self.children]
        if not self.ending:
            found += [child.silence(now, self._hang_timeout) for child in self.children if not child.failure]
        return [failure for failure in found if failure]

    def _first(self, failures: Sequence[Failure]) -> WorkerError:
        # A neighbour may raise, for its lost connection, before the end of a killed rank is noticed.
        first, *others = sorted(failures, key=lambda failure: failure.at - SETTLE_S * failure.sudden)
        return self.error(first, [other for other in others if first.silent and other.silent])
