"""A rank as rank 0's process hears it, whoever keeps its process: what it said last, and what is wrong with it."""

from __future__ import annotations

import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from npu_zoo.parallel.collectives import Missing
from npu_zoo.parallel.link import Done, Failed, Heartbeat, Message, Ready, TimedOut

LEAST_CPU_TIME_S = 0.05
"""CPU seconds of the main thread that show that a rank computes."""

LEAST_CPU_SHARE = 0.1
"""The share of one CPU, of all threads, that shows it too; those of idle process groups use a few per cent."""

_STANDSTILL = 3.0


@dataclass(frozen=True)
class Failure:
    """What went wrong with a rank.

    Attributes:
        at: when, as ``time.monotonic`` has it here.
        what: what happened, as the rest of a sentence that begins with the rank; further lines are a traceback.
        host: where the rank runs.
        sudden: whether it ended in a way that no other rank's failure brings about.
        silent: whether it only stopped getting on, as do ranks that wait for another.
        timed_out: the collective operation that was not done in time, where that was it.
    """

    rank: int
    at: float
    what: str
    host: str = ""
    sudden: bool = False
    silent: bool = False
    timed_out: TimedOut | None = None


class Peer(ABC):
    """One rank. Everything that changes is guarded by ``changed``, which is notified of each change.

    Args:
        rank: which it is.
        host: where it runs, as far as it is known.
        stage: what it does before it was heard.
        changed: shared by the peers of a group.

    Attributes:
        ready: it can take work.
        done: its function returned.
        ended: it is gone, and its connection is closed.
        failure: the first thing that went wrong before it was asked to stop.
    """

    unheard = "stopped or has locked its interpreter"

    def __init__(self, rank: int, host: str, stage: str, changed: threading.Condition) -> None:
        self.rank = rank
        self.host = host
        self.ready = self.done = self.ended = False
        self.failure: Failure | None = None
        self._first_stage = stage
        self._changed = changed
        self._asked = False
        self._heartbeat: Heartbeat | None = None
        self._progress: Heartbeat | None = None
        self._heard_at = self._forgiven_at = time.monotonic()

    @abstractmethod
    def ask(self) -> None:
        """Ask the rank to stop: from now on its end is no failure."""

    @abstractmethod
    def send_signal(self, number: signal.Signals) -> None:
        """Have its process end by a signal; nothing where it has ended."""

    def release(self) -> None:
        """Hear it no longer, whether it has ended or not."""
        self._asked = True

    @property
    def stage(self) -> str:
        """What the rank does, as far as it was heard."""
        return self._heartbeat.stage if self._heartbeat else self._first_stage

    @property
    def beat(self) -> Heartbeat | None:
        """Its last heartbeat, in this process's time."""
        return self._heartbeat

    def forgive(self, now: float) -> None:
        """Count no silence from before ``now``, since the parent itself stood still."""
        self._heard_at = self._forgiven_at = now

    def silence(self, now: float, hang_timeout: float, *, idle_is_hanging: bool = True) -> Failure | None:
        """What is wrong where the rank has been silent, or idle within a step, for over ``hang_timeout`` seconds.

        Before its first heartbeat it is the caller who waits for it, and after its end there is nothing to hear.

        Args:
            idle_is_hanging: whether a step that neither uses a CPU nor waits for other ranks hangs.
        """
        beat = self._heartbeat
        if beat is None or self.done or self.ended:
            return None
        unheard = now - self._heard_at
        if unheard > hang_timeout:
            return self._silent(self._heard_at, f"{self.unheard}: no heartbeat for {unheard:.3g} s", beat)
        if beat.last_beat is not None:
            since = max(beat.last_beat, self._forgiven_at)
            if beat.sent_at - since > hang_timeout:
                what = f"hangs: its step has not got on for {beat.sent_at - since:.3g} s"
                return self._silent(since, what, beat)
        if idle_is_hanging and beat.stepping and self._progress is not None:
            since = max(self._progress.sent_at, self._forgiven_at)
            if beat.sent_at - since > hang_timeout:
                what = f"hangs: its step has neither computed nor waited for others for {beat.sent_at - since:.3g} s"
                return self._silent(since, what, beat)
        return None

    def missing(self) -> Missing | None:
        """The rank where it is in a step and does not wait for others; None where it waits, rests or has ended."""
        beat = self._heartbeat
        late = beat is not None and beat.stepping and beat.waiting is None
        if beat is None or not late or self.failure is not None or self.done or self.ended:
            return None
        return Missing(self.rank, self.host, beat.stage, beat.position)

    def _silent(self, at: float, what: str, beat: Heartbeat) -> Failure:
        where = f"at '{beat.stage}'" + (f" ({beat.position})" if beat.position else "")
        return Failure(self.rank, at, f"{what}, {where}", self.host, silent=True)

    def _local_time(self, at: float) -> float:
        """A time of the rank's clock as this process's clock has it."""
        return at

    def _hear(self, message: Message) -> None:
        with self._changed:
            self._heard_at = time.monotonic()
            if isinstance(message, Heartbeat):
                self._take(_moved(message, self._local_time))
            elif isinstance(message, Ready):
                self.ready = True
            elif isinstance(message, Done):
                self.done = True
            else:
                at = self._local_time(message.at)
                self._fail(Failure(self.rank, at, _told(message), self.host, timed_out=message.timed_out))
            self._changed.notify_all()

    def _take(self, beat: Heartbeat) -> None:
        before, self._heartbeat = self._heartbeat, beat
        stood_still = before is not None and beat.sent_at - before.sent_at > _STANDSTILL
        if self._progress is None or stood_still or _got_on(self._progress, beat):
            self._progress = beat

    def _fail(self, failure: Failure) -> None:
        if not self._asked and self.failure is None:
            self.failure = failure


def _moved(beat: Heartbeat, clock: Callable[[float], float]) -> Heartbeat:
    last_beat = None if beat.last_beat is None else clock(beat.last_beat)
    return replace(beat, sent_at=clock(beat.sent_at), last_beat=last_beat)


def _got_on(since: Heartbeat, beat: Heartbeat) -> bool:
    """Whether a rank that is in a step did anything since an earlier heartbeat."""
    if not beat.stepping or beat.waiting is not None:
        return True
    if (since.stage, since.position, since.steps) != (beat.stage, beat.position, beat.steps):
        return True
    enough = max(LEAST_CPU_TIME_S, LEAST_CPU_SHARE * (beat.sent_at - since.sent_at))
    return beat.main_cpu_time - since.main_cpu_time >= LEAST_CPU_TIME_S or beat.cpu_time - since.cpu_time >= enough


def _told(failed: Failed) -> str:
    indented = "".join(f"\n  {line}" for line in failed.traceback.splitlines())
    return f"{failed.what}, at '{failed.stage}'{indented}"
