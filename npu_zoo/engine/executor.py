"""Runs a model on several ranks: the first in this process, the others in processes of their own, which it commands."""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

from torch import Tensor

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress
from npu_zoo.engine.runner import ModelRunner
from npu_zoo.engine.step import StepRow
from npu_zoo.parallel.groups import Ranks, open_store
from npu_zoo.parallel.link import Link
from npu_zoo.parallel.numa import apply
from npu_zoo.parallel.processes import WorkerGroup

START_TIMEOUT_S = 1800.0
COLLECTIVE_TIMEOUT = timedelta(seconds=300)
_FOLLOWER = "npu_zoo.engine.executor:follow"
_GRACE_S = 3.0
_LEARN_S = 5.0
"""How long a failed operation waits to learn which rank's failure made it fail."""

T = TypeVar("T")


@dataclass(frozen=True)
class Assignment:
    """What a rank is started with."""

    config: EngineConfig
    rank: int
    port: int


@dataclass(frozen=True)
class Execute:
    """Compute a step."""

    rows: tuple[StepRow, ...]


@dataclass(frozen=True)
class ComputeLogits:
    """Take hidden states, which are the same on all ranks, to logits."""

    hidden: Tensor


def create_runner(config: EngineConfig, progress: Progress | None = None) -> ModelRunner:
    """The runner of a config's ranks."""
    return ModelRunner(config, progress) if config.world_size == 1 else LeadingRunner(config, progress)


class LeadingRunner(ModelRunner):
    """The first rank, which tells the others what to compute before it computes its own share.

    Raises:
        WorkerError: another rank failed; names it, with its first error.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        size = config.world_size
        store = open_store(0, size, leads=True, timeout=COLLECTIVE_TIMEOUT)
        assignments = [Assignment(config, rank, store.port) for rank in range(1, size)]
        self._together = True
        self._workers = WorkerGroup(_FOLLOWER, assignments)
        try:
            self._ranks = self._guarded(lambda: Ranks(store, 0, size, COLLECTIVE_TIMEOUT))
            self._workers.watch(lambda _: self._ranks.control.abort())
            self._guarded(lambda: super(LeadingRunner, self).__init__(config, progress, self._ranks.tp))
            self._workers.wait_ready(START_TIMEOUT_S)
        except BaseException:
            self._workers.shutdown(0)
            raise

    def execute(self, rows: Sequence[StepRow]) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`ModelRunner.execute`."""

        def run() -> tuple[Tensor, list[Tensor]]:
            self._ranks.control.broadcast(Execute(tuple(rows)))
            return super(LeadingRunner, self).execute(rows)

        return self._guarded(run)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`ModelRunner.compute_logits`; a step's own logits are part of its command."""

        def run() -> Tensor:
            self._ranks.control.broadcast(ComputeLogits(hidden))
            return super(LeadingRunner, self).compute_logits(hidden)

        return self._guarded(run)

    def shutdown(self) -> None:
        """End the other ranks; those that wait for a command are told that there is none."""
        if self._together:  # else they are in the middle of a step, where they hear nothing
            with contextlib.suppress(RuntimeError):
                self._ranks.control.broadcast(None)
        self._workers.shutdown(_GRACE_S if self._together else 0)

    def _guarded(self, work: Callable[[], T]) -> T:
        """Run something in which ranks talk; a failure of another rank is told as what it was."""
        with _interrupts_wait():
            together, self._together = self._together, False
            try:
                result = work()
            except RuntimeError:
                self._workers.check(wait=_LEARN_S)
                raise
            self._together = together
            return result


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Keep a Ctrl-C for the end of the block: ranks that stopped at different places would not find together again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[FrameType | None] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen and callable(before):
        before(signal.SIGINT, seen[0])


def follow(assignment: Assignment, link: Link) -> None:
    """What every other rank does: load its share, then compute what it is told to."""
    config, size = assignment.config, assignment.config.world_size
    for fault in apply(config.rank_bindings[assignment.rank]) if config.rank_bindings else ():
        warnings.warn(fault, RuntimeWarning, stacklevel=2)
    with link.working("joining the other ranks"):
        store = open_store(assignment.port, size, leads=False, timeout=COLLECTIVE_TIMEOUT)
        ranks = Ranks(store, assignment.rank, size, COLLECTIVE_TIMEOUT)
    with link.working("loading weights"):
        runner = ModelRunner(config, tp=ranks.tp)
    link.send_ready()
    while not link.stopping.is_set():
        command = ranks.control.broadcast()
        if command is None:
            return
        with link.working("computing a step"):
            if isinstance(command, Execute):
                runner.execute(command.rows)
            elif isinstance(command, ComputeLogits):
                runner.compute_logits(command.hidden)
        link.rest()
