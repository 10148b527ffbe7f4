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
from typing import Any, TypeVar

import torch
from torch import Tensor

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress
from npu_zoo.engine.outputs import last_stage_rank
from npu_zoo.engine.runner import ModelRunner
from npu_zoo.engine.step import StepRow
from npu_zoo.parallel.groups import Host, Joined, join, open_store
from npu_zoo.parallel.link import Link
from npu_zoo.parallel.numa import apply
from npu_zoo.parallel.processes import WorkerGroup

START_TIMEOUT_S = 1800.0
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
    """Take hidden states to logits, where the head is.

    Attributes:
        hidden: the bytes of ``rows`` rows; as bytes, since what pickles a tensor depends on the device's library.
    """

    hidden: bytes
    rows: int

    @classmethod
    def of(cls, hidden: Tensor) -> ComputeLogits:
        """From [rows, hidden_size]."""
        return cls(hidden.cpu().contiguous().view(torch.uint8).numpy().tobytes(), len(hidden))

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """The [rows, hidden_size], on the host."""
        return torch.frombuffer(bytearray(self.hidden), dtype=dtype).view(self.rows, -1)


@dataclass(frozen=True)
class Report:
    """Tell what the rank holds."""


def create_runner(config: EngineConfig, progress: Progress | None = None) -> ModelRunner:
    """The runner of a config's ranks."""
    return ModelRunner(config, progress) if config.world_size == 1 else LeadingRunner(config, progress)


class RankRunner(ModelRunner):
    """A runner among others, which all do what the first one's commands say."""

    def __init__(self, config: EngineConfig, joined: Joined, progress: Progress | None = None) -> None:
        self._joined = joined
        super().__init__(config, progress, joined.ranks)

    def obey(self, command: object) -> Any:
        """Do this rank's part of a command; on the first rank the result is the whole."""
        if isinstance(command, Execute):
            return super().execute(command.rows)
        if isinstance(command, ComputeLogits):
            return self._logits_for_the_first(command.tensor(self.dtype))
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

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        size, timeout = config.world_size, timedelta(seconds=config.collective_timeout)
        store = open_store(0, size, leads=True, timeout=timeout)
        assignments = [Assignment(config, rank, store.port) for rank in range(1, size)]
        self._together = True
        self._workers = WorkerGroup(_FOLLOWER, assignments)
        try:
            joined = self._guarded(lambda: _join(store, config, 0))
            self._workers.watch(lambda _: joined.abort())
            self._guarded(lambda: super(LeadingRunner, self).__init__(config, joined, progress))
            self._workers.wait_ready(START_TIMEOUT_S)
        except BaseException:
            self._workers.shutdown(0)
            raise

    def execute(self, rows: Sequence[StepRow]) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`ModelRunner.execute`."""
        outputs: tuple[Tensor, list[Tensor]] = self._command(Execute(tuple(rows)))
        return outputs

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`ModelRunner.compute_logits`; a step's own logits are part of its command."""
        logits: Tensor = self._command(ComputeLogits.of(hidden))
        return logits

    def report(self) -> list[dict[str, Any]]:
        """See :meth:`ModelRunner.report`."""
        reports: list[dict[str, Any]] = self._command(Report())
        return reports

    def shutdown(self) -> None:
        """End the other ranks; those that wait for a command are told that there is none."""
        if self._together:  # else they are in the middle of a step, where they hear nothing
            with contextlib.suppress(RuntimeError):
                self._joined.control.broadcast(None)
                self._joined.close()
        self._workers.shutdown(_GRACE_S if self._together else 0)

    def _command(self, command: object) -> Any:
        def run() -> Any:
            self._joined.control.broadcast(command)
            return self.obey(command)

        return self._guarded(run)

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
        timeout = timedelta(seconds=config.collective_timeout)
        store = open_store(assignment.port, size, leads=False, timeout=timeout)
        joined = _join(store, config, assignment.rank)
    with link.working("loading weights"):
        runner = RankRunner(config, joined)
    link.send_ready()
    while not link.stopping.is_set():
        command = joined.control.broadcast()
        if command is None:
            joined.close()
            return
        with link.working("computing a step"):
            runner.obey(command)
        link.rest()


def _join(store: Any, config: EngineConfig, rank: int) -> Joined:
    """Meet the other ranks, all of which are on this host."""
    timeout = timedelta(seconds=config.collective_timeout)
    return join(store, config.split.place(rank), Host(rank, config.world_size), timeout, config.device)
