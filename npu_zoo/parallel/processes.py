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
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from npu_zoo.parallel.children import Child
from npu_zoo.parallel.link import Setup
from npu_zoo.parallel.supervised import GRACE_S, HANG_TIMEOUT_S, HEARTBEAT_S, SupervisedRanks, heartbeat_interval
from npu_zoo.parallel.supervision import Supervisor


class WorkerGroup(SupervisedRanks):
    """Worker processes of consecutive ranks. Ends with its ``with`` block, with :meth:`shutdown`, or with the parent.

    Args:
        target: the function that each worker runs, ``package.module:function``, called as ``function(payload, link)``
            with a :class:`~npu_zoo.parallel.link.Link`. It has to return once ``link.stopping`` is set. An error is
            dated when it leaves the function: a ``finally`` that other ranks notice makes theirs come first.
        payloads: one per worker; pickled, and sent through a socket that only the worker has.
        environs: variables that each worker has besides the parent's.
        first_rank: the rank of the first worker.
        hang_timeout: seconds without a heartbeat, or within one step, after which a rank counts as hanging.
        interval: seconds between two heartbeats; fewer where ``hang_timeout`` asks for more of them.
        idle_is_hanging: whether a rank hangs too that neither computes nor waits for others within a step; False where
            steps run on a device, which is waited for without a CPU.

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
        interval: float = HEARTBEAT_S,
        idle_is_hanging: bool = True,
    ) -> None:
        wanted = [{**os.environ, **own} for own in ([{}] * len(payloads) if environs is None else environs)]
        path = tuple(entry or str(Path.cwd()) for entry in sys.path)
        interval = heartbeat_interval(hang_timeout, interval)
        setups = [
            Setup(rank, target, pickle.dumps(payload), path, environ.get("PYTHONPATH"), interval)
            for rank, (payload, environ) in enumerate(zip(payloads, wanted, strict=True), first_rank)
        ]
        # The whole path, not just the package's folder: what stands before the standard library shadows it.
        environs = [{**environ, "PYTHONPATH": os.pathsep.join(path)} for environ in wanted]
        super().__init__(Supervisor(hang_timeout, idle_is_hanging=idle_is_hanging))
        self._finalizer = weakref.finalize(self, self._supervisor.end, GRACE_S)
        try:
            start_children(self._supervisor, setups, environs)
        except BaseException:
            self._supervisor.end(0)
            raise

    @property
    def pids(self) -> dict[int, int]:
        """The processes that live, by rank."""
        return {child.rank: child.pid for child in _children(self._supervisor) if child.pid is not None}


def start_children(supervisor: Supervisor, setups: Sequence[Setup], environs: Sequence[Mapping[str, str]]) -> None:
    """Start a supervisor's children, and have it watch them.

    Args:
        setups: one per child.
        environs: their whole environments.

    Raises:
        EngineError: a process or thread cannot be started; the supervisor has to end those that were.
    """
    for setup, environ in zip(setups, environs, strict=True):
        try:
            child = Child(setup, environ, supervisor.changed)
        except OSError as error:
            raise supervisor.start_error(f"the process of rank {setup.rank}", error) from error
        supervisor.peers.append(child)
        child.start()
    children = _children(supervisor)
    supervisor.wait_for(lambda: all(child.pid or child.ended for child in children))
    for child in children:
        if child.start_error is not None:
            raise supervisor.start_error(f"the process of rank {child.rank}", child.start_error) from child.start_error
    supervisor.start()


def _children(supervisor: Supervisor) -> list[Child]:
    return [peer for peer in supervisor.peers if isinstance(peer, Child)]


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
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if received:  # raised where it was lost, as in a callback while a library is imported
        raise SystemExit(128 + received[0])
