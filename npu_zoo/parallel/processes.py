"""Starts the processes of a parallel run on this host, watches them, and ends them.

Rank 0 lives in the parent; the others are interpreters of their own, started afresh. The first of them that dies,
raises or hangs is known within a second of its death, or of ``hang_timeout``, with one message about it. Nothing of
them outlives the parent, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from npu_zoo.core.errors import WorkerError
from npu_zoo.parallel.children import Child
from npu_zoo.parallel.link import Setup
from npu_zoo.parallel.supervision import SETTLE_S, Supervisor

HANG_TIMEOUT_S = 30.0
HEARTBEAT_S = 1.0
GRACE_S = 3.0
_BEATS_PER_TIMEOUT = 4

Progress = Callable[[Mapping[int, str]], None]
"""Told what each rank does, by rank."""


class WorkerGroup:
    """Worker processes of consecutive ranks. Ends with its ``with`` block, with :meth:`shutdown`, or with the parent.

    Args:
        target: the function that each worker runs, ``package.module:function``, called as ``function(payload, link)``
            with a :class:`~npu_zoo.parallel.link.Link`. It has to return once ``link.stopping`` is set. An error is
            dated when it leaves the function: a ``finally`` that other ranks notice makes theirs come first.
        payloads: one per worker; pickled, and sent through a socket that only the worker has.
        environs: variables that each worker has besides the parent's.
        first_rank: the rank of the first worker.
        hang_timeout: seconds without a heartbeat, or within one step, after which a rank counts as hanging.
        heartbeat_interval: seconds between two heartbeats; fewer where ``hang_timeout`` asks for more of them.

    Raises:
        EngineError: a process cannot be started; none is left then.
    """

    def __init__(
        self,
        target: str,
        payloads: list[Any],
        *,
        environs: list[dict[str, str]] | None = None,
        first_rank: int = 1,
        hang_timeout: float = HANG_TIMEOUT_S,
        heartbeat_interval: float = HEARTBEAT_S,
    ) -> None:
        wanted = [{**os.environ, **own} for own in ([{}] * len(payloads) if environs is None else environs)]
        path = tuple(entry or str(Path.cwd()) for entry in sys.path)
        interval = min(heartbeat_interval, hang_timeout / _BEATS_PER_TIMEOUT)
        setups = [
            Setup(rank, target, pickle.dumps(payload), path, environ.get("PYTHONPATH"), interval)
            for rank, (payload, environ) in enumerate(zip(payloads, wanted, strict=True), first_rank)
        ]
        # The whole path, not just the package's folder: what stands before the standard library shadows it.
        environs = [{**environ, "PYTHONPATH": os.pathsep.join(path)} for environ in wanted]
        self._supervisor = Supervisor(setups, environs, hang_timeout)
        self._finalizer = weakref.finalize(self, self._supervisor.end, GRACE_S)
        try:
            self._supervisor.start()
        except BaseException:
            self._supervisor.end(0)
            raise

    @property
    def pids(self) -> dict[int, int]:
        """The processes that live, by rank."""
        return {child.rank: child.pid for child in self._supervisor.children if child.pid is not None}

    def stages(self) -> dict[int, str]:
        """What each rank that has not ended does, as far as it was heard."""
        return {child.rank: child.stage for child in self._supervisor.children if not child.ended}

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
        """Wait until every worker has called ``link.send_ready()``.

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
            if time.monotonic() >= deadline or any(child.ended for child in unready):
                self.check(wait=SETTLE_S * 2)
                raise self._late(unready, timeout)
            self._wait_for_change(unready, told, deadline)

    def shutdown(self, grace: float = GRACE_S) -> None:
        """End all workers: ask them, send SIGTERM, and after ``grace`` seconds SIGKILL. Again, it does nothing."""
        self._supervisor.end(grace)

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _unready(self) -> list[Child]:
        return [child for child in self._supervisor.children if not child.ready]

    def _wait_for_change(self, unready: Sequence[Child], told: Mapping[int, str], deadline: float) -> None:
        supervisor = self._supervisor

        def changed() -> bool:
            return supervisor.failure is not None or self._unready() != unready or self.stages() != told

        supervisor.wait_for(changed, max(0, deadline - time.monotonic()))

    def _late(self, unready: Sequence[Child], timeout: float) -> WorkerError:
        host = self._supervisor.host
        ranks = ", ".join(str(child.rank) for child in unready)
        lines = [f"rank {ranks} on {host} is not ready, after {timeout:g} s at most"]
        lines += [f"rank {child.rank}: {'ended' if child.ended else child.stage}" for child in unready]
        return WorkerError("\n  ".join(lines), unready[0].rank, host)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Make SIGTERM leave the block as SystemExit, so that workers inside it are ended gently; exit code 143.

    Without it SIGTERM ends the process at once, and Linux kills the workers. Where the program handles SIGTERM itself,
    or outside the main thread, this changes nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _tell(supervisor: Supervisor, on_failure: Callable[[WorkerError], None]) -> None:
    supervisor.wait_for(lambda: supervisor.failure is not None or supervisor.ending)
    if supervisor.failure is not None:
        on_failure(supervisor.failure)
