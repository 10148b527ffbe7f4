"""What a group of supervised ranks offers to rank 0's process, whoever started them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

from npu_zoo.core.errors import WorkerError
from npu_zoo.parallel.collectives import CollectiveTimeout, Missing
from npu_zoo.parallel.peers import Peer
from npu_zoo.parallel.supervision import SETTLE_S, Supervisor

HANG_TIMEOUT_S = 8.0
HEARTBEAT_S = 1.0
GRACE_S = 3.0
_BEATS_PER_TIMEOUT = 4

Progress = Callable[[Mapping[int, str]], None]
"""Told what each rank does, by rank."""

Self = TypeVar("Self", bound="SupervisedRanks")


def heartbeat_interval(hang_timeout: float, wanted: float = HEARTBEAT_S) -> float:
    """Seconds between two heartbeats; fewer than wanted where ``hang_timeout`` asks for more of them."""
    return min(wanted, hang_timeout / _BEATS_PER_TIMEOUT)


class SupervisedRanks:
    """The ranks beside rank 0. Ends with its ``with`` block, with :meth:`shutdown`, or with this process."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    @property
    def waiting(self) -> Callable[[], str | None] | None:
        """Tells which collective operation rank 0 waits in, itself; for the engine to set."""
        return self._supervisor.waiting

    @waiting.setter
    def waiting(self, operation: Callable[[], str | None]) -> None:
        self._supervisor.waiting = operation

    def stages(self) -> dict[int, str]:
        """What each rank that has not ended does, as far as it was heard."""
        return {peer.rank: peer.stage for peer in self._supervisor.peers if not peer.ended}

    def check(self, wait: float = 0.0) -> None:
        """Return where no rank has failed.

        Args:
            wait: seconds to wait for a failure to become known, for a caller whose own error may come from one.

        Raises:
            WorkerError: names rank, host and what happened, of the first that failed.
        """
        supervisor = self._supervisor
        supervisor.wait_for(lambda: supervisor.failure is not None or supervisor.ending, wait)
        if supervisor.failure is not None:
            raise supervisor.failure

    def watch(self, on_failure: Callable[[WorkerError], None]) -> None:
        """Have a thread call ``on_failure`` once, with the first failure, as soon as it is known.

        It is not called where the group is shut down without one. It may call :meth:`shutdown`.
        """
        arguments = (self._supervisor, on_failure)
        threading.Thread(target=_tell, args=arguments, name="watch of the ranks", daemon=True).start()

    def wait_ready(self, timeout: float, progress: Progress | None = None) -> None:
        """Wait until every rank has called ``link.send_ready()``.

        Args:
            timeout: seconds.
            progress: called in this thread whenever a rank says that it does something else.

        Raises:
            WorkerError: a rank failed, or was not ready in time; it is named with what it was doing.
        """
        deadline = time.monotonic() + timeout
        told: dict[int, str] = {}
        while unready := self._unready():
            self.check()
            stages = self.stages()
            if progress is not None and stages != told:
                progress(stages)
            told = stages
            if time.monotonic() >= deadline or any(peer.ended for peer in unready):
                self.check(wait=SETTLE_S * 2)
                raise self._late(unready, timeout)
            self._wait_for_change(unready, told, deadline)

    def missing(self, ranks: Collection[int] = ()) -> list[Missing]:
        """The ranks that are in a step and do not wait for others, by their last heartbeats, a second old at most.

        Args:
            ranks: those to look at; empty for all.
        """
        return self._supervisor.missing(ranks)

    def timed_out(self, operation: str, timeout: float, ranks: Collection[int] = ()) -> CollectiveTimeout:
        """The error where rank 0 waited for a collective operation for too long; names who did not come.

        Args:
            operation: such as ``all_reduce of group tp``.
            timeout: seconds.
            ranks: those of the group; empty for all.
        """
        return CollectiveTimeout(operation, timeout, tuple(ranks), self.missing(ranks))

    def shutdown(self, grace: float = GRACE_S) -> None:
        """End all ranks: ask them, send SIGTERM, and after ``grace`` seconds SIGKILL. Again, it does nothing."""
        self._supervisor.end(grace)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _unready(self) -> list[Peer]:
        return [peer for peer in self._supervisor.peers if not peer.ready]

    def _wait_for_change(self, unready: Sequence[Peer], told: Mapping[int, str], deadline: float) -> None:
        supervisor = self._supervisor

        def changed() -> bool:
            return supervisor.failure is not None or self._unready() != unready or self.stages() != told

        supervisor.wait_for(changed, max(0, deadline - time.monotonic()))

    def _late(self, unready: Sequence[Peer], timeout: float) -> WorkerError:
        first, several = unready[0], len({peer.host for peer in unready}) > 1
        ranks = ", ".join(str(peer.rank) for peer in unready)
        where = "" if several or not first.host else f" on {first.host}"
        lines = [f"rank {ranks}{where} is not ready, after {timeout:g} s at most"]
        for peer in unready:
            named = f"rank {peer.rank}" + (f" on {peer.host}" if several and peer.host else "")
            lines.append(f"{named}: {'ended' if peer.ended else peer.stage}")
        return WorkerError("\n  ".join(lines), first.rank, first.host)


def _tell(supervisor: Supervisor, on_failure: Callable[[WorkerError], None]) -> None:
    supervisor.wait_for(lambda: supervisor.failure is not None or supervisor.ending)
    if supervisor.failure is not None:
        on_failure(supervisor.failure)
