"""Runs a model on several ranks: the first in this process, the others in processes of their own, which it commands."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

from torch import Tensor

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import EngineError, WorkerError
from npu_zoo.engine.commands import Command, ComputeLogits, Draft, Execute, Report
from npu_zoo.engine.outputs import last_stage_rank
from npu_zoo.engine.runner import ModelRunner
from npu_zoo.engine.speculation.steps import SeenStep
from npu_zoo.engine.starting import Assignment, join_ranks, launch_environment, start_ranks
from npu_zoo.engine.step import StepRow
from npu_zoo.parallel.collectives import CollectiveTimeout
from npu_zoo.parallel.environment import LaunchEnvironment
from npu_zoo.parallel.groups import LOOPBACK, Host, Joined, open_store, prefixed
from npu_zoo.parallel.launched import join_store, launched_link
from npu_zoo.parallel.link import Link
from npu_zoo.parallel.numa import apply

START_TIMEOUT_S = 1800.0
_GRACE_S = 3.0
_LEARN_S = 5.0
"""How long a failed operation waits to learn which rank's failure made it fail."""
_SECONDS_TO_UNWIND = 60.0
_SECONDS_OF_IDLENESS = 1.5
_IDLE_SHARE = 0.1
"""How long the first rank may stay in a step after another has failed: the longer time where it computes."""
_STUCK = 70
"""The exit code of a first rank that does not come out of a step (EX_SOFTWARE)."""

T = TypeVar("T")


def create_runner(config: EngineConfig, progress: Progress | None = None) -> ModelRunner:
    """The runner of a config's ranks.

    Where a launcher started this process as another rank than the first it works for that one until the end of the
    run, and leaves by SystemExit.
    """
    environment = launch_environment(config)
    if environment is not None and environment.rank:
        follow_launched(config, environment)
    return ModelRunner(config, progress) if config.world_size == 1 else LeadingRunner(config, environment, progress)


class RankRunner(ModelRunner):
    """A runner among others, which all do what the first one's commands say."""

    def __init__(self, config: EngineConfig, joined: Joined, progress: Progress | None = None) -> None:
        self._joined = joined
        super().__init__(config, progress, joined.ranks)

    def obey(self, command: Command) -> Any:
        """Do this rank's part of a command; on the first rank the result is the whole."""
        if isinstance(command, Execute):
            return super().execute(command.rows)
        if isinstance(command, ComputeLogits):
            return self._logits_for_the_first(command.tensor(self.dtype))
        if isinstance(command, Draft):
            return super()._draft(command.steps)
        return self._joined.control.gather(self.own_report())

    def own_report(self) -> dict[str, Any]:
        """See :meth:`ModelRunner.own_report`."""
        traffic = self._joined.traffic
        return {**super().own_report(), "calls": dict(traffic.calls), "bytes": dict(traffic.bytes)}

    def _logits_for_the_first(self, hidden: Tensor) -> Tensor:
        place, world = self._place, self._joined.ranks.world
        if place.is_last_stage and place.replica == 0:
            logits = super().compute_logits(hidden)
            if place.rank and place.tp_rank == 0:
                world.send(logits, 0)
            return logits
        if place.rank:
            return hidden
        shape = (len(hidden), self.config.model_config.vocab_size)
        received: Tensor = world.receive(shape, self.dtype, last_stage_rank(place, 0))
        return received


class LeadingRunner(RankRunner):
    """The first rank, which tells the others what to compute before it computes its own share.

    Raises:
        WorkerError: another rank failed; names it, with its first error.
    """

    def __init__(
        self, config: EngineConfig, environment: LaunchEnvironment | None, progress: Progress | None = None
    ) -> None:
        self._together, self._inside, self._ended = True, False, False
        self._start = start = start_ranks(config, environment)
        self._workers = start.ranks
        try:
            joined = self._learning(lambda: join_ranks(config, 0, start.store, start.host, self._workers.check))
        except BaseException:
            self._workers.shutdown(0)
            raise
        self._joined = joined
        self._workers.waiting = lambda: joined.traffic.waiting
        self._workers.watch(_calling(self))
        try:
            self._learning(lambda: super(LeadingRunner, self).__init__(config, joined, self._checking(progress)))
            self._workers.wait_ready(START_TIMEOUT_S)
        except BaseException:
            self._together = False
            self._end_ranks()
            raise

    def execute(self, rows: Sequence[StepRow]) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`ModelRunner.execute`."""
        outputs: tuple[Tensor, list[Tensor]] = self._command(Execute(tuple(rows)))
        return outputs

    def _draft(self, steps: Sequence[SeenStep]) -> Tensor:
        drafts: Tensor = self._command(Draft(tuple(steps)))
        return drafts

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`ModelRunner.compute_logits`; a step's own logits are part of its command."""
        logits: Tensor = self._command(ComputeLogits.of(hidden))
        return logits

    @property
    def master_port(self) -> int:
        """See :attr:`ModelRunner.master_port`."""
        return self._start.port

    def report(self) -> list[dict[str, Any]]:
        """See :meth:`ModelRunner.report`."""
        reports: list[dict[str, Any]] = self._command(Report())
        return reports

    def shutdown(self) -> None:
        """End the other ranks; those that wait for a command are told that there is none. Again, it does nothing."""
        super().shutdown()
        self._end_ranks()

    def _end_ranks(self) -> None:
        if self._ended:
            return
        self._ended, together = True, self._together
        try:
            if together:  # else they are in the middle of a step, where they hear nothing
                with contextlib.suppress(RuntimeError):
                    self._joined.control.broadcast(None)
                    self._joined.close()
        finally:
            self._workers.shutdown(_GRACE_S if together else 0)
            self._joined.drop()
            self._start = replace(self._start, store=None)  # the port is free once nobody holds it

    def _checking(self, progress: Progress | None) -> Progress:
        """Progress that stops where another rank has failed, as this one would not notice before it needs it."""

        def tell(stage: str, done: int, total: int) -> None:
            self._workers.check()
            if progress is not None:
                progress(stage, done, total)

        return tell

    def _command(self, command: Command) -> Any:
        if not self._together or self._ended:
            raise EngineError(
                "the ranks are not together after an earlier failure, or have ended; start another engine"
            )

        def run() -> Any:
            self._joined.control.broadcast(command)
            return self.obey(command)

        with _interrupts_wait():
            self._together = False
            try:
                with self._being_inside():
                    result = self._learning(run)
            except BaseException:
                self._workers.shutdown(0)  # they are in the middle of the step
                raise
            self._together = True
            return result

    def _learning(self, work: Callable[[], T]) -> T:
        """Run something in which ranks talk; a failure of another rank is told as what it was."""
        try:
            return work()
        except CollectiveTimeout as error:
            self._workers.check(wait=_LEARN_S)
            raise self._workers.timed_out(error.operation, error.timeout, error.ranks) from error
        except (RuntimeError, SystemExit):  # a launcher ends all of a host's ranks once one of them has ended
            self._workers.check(wait=_LEARN_S)
            raise

    @contextlib.contextmanager
    def _being_inside(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def give_up(self, failure: WorkerError) -> None:
        """Another rank has failed: end all others, which ends what this one waits for; or else its process."""
        self._workers.shutdown(0)
        self._joined.abort()
        if not self._unwinds():
            told = f"error: {failure}\nrank 0 does not come out of its step; its process ends"
            print(told, file=sys.stderr, flush=True)
            os._exit(_STUCK)

    def _unwinds(self) -> bool:
        """Whether this rank comes out of its step in time; False as soon as it neither does nor computes."""
        deadline = time.monotonic() + _SECONDS_TO_UNWIND
        while self._inside and time.monotonic() < deadline:
            used = time.process_time()
            time.sleep(_SECONDS_OF_IDLENESS)
            if time.process_time() - used < _SECONDS_OF_IDLENESS * _IDLE_SHARE:
                break
        return not self._inside


def _calling(runner: LeadingRunner) -> Callable[[WorkerError], None]:
    """Calls a runner with a failure, and keeps none alive that nobody else has."""
    reference = weakref.ref(runner)

    def tell(failure: WorkerError) -> None:
        found = reference()
        if found is not None:
            found.give_up(failure)

    return tell


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Keep a Ctrl-C for the end of the block: ranks that stopped at different places would not find together again."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
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
    """What every other rank does that the first one started."""
    config, rank = assignment.config, assignment.rank  # all ranks are of this machine
    for fault in apply(config.rank_bindings[rank]) if config.rank_bindings else ():
        warnings.warn(fault, RuntimeWarning, stacklevel=2)
    timeout = timedelta(seconds=config.collective_timeout)
    with link.working("joining the other ranks"):
        store = open_store(assignment.port, config.world_size, timeout)
    _work(config, rank, store, Host(rank, config.world_size, LOOPBACK), link)


def follow_launched(config: EngineConfig, environment: LaunchEnvironment) -> NoReturn:
    """What every other rank does that a launcher started.

    Raises:
        SystemExit: the run is over; with 1 where it failed.
    """
    store = join_store(environment)
    link = launched_link(store, environment)
    host = Host(environment.local_rank, environment.local_world_size, link.address)
    with link.reporting():
        _work(config, environment.rank, prefixed(store, link.attempt), host, link)
    raise SystemExit(int(link.failed))


def _work(config: EngineConfig, rank: int, store: Any, host: Host, link: Link) -> None:
    """Load this rank's share, then compute what the first one says."""
    with link.working("joining the other ranks"):
        joined = join_ranks(config, rank, store, host)
    link.waiting = lambda: joined.traffic.waiting
    with link.working("loading weights"):
        runner = RankRunner(config, joined)
    link.send_ready()
    while not link.stopping.is_set():
        command: Command | None = joined.control.broadcast()
        if command is None:
            joined.close()
            return
        with link.stepping("computing a step"):
            runner.obey(command)
        link.rest()
