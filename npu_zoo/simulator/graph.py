"""Graphs: while a stream is captured, operators are put on a tape instead of being run; a replay runs the tape.

The tape holds views of raw device memory, as a captured graph on hardware holds addresses: what was freed and handed
out again shows as wrong values here too.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from npu_zoo.simulator.errors import CaptureError
from npu_zoo.simulator.runtime import Event, Runtime

Step = Callable[[], None]


@dataclass
class _Tape:
    steps: list[Step] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)


@dataclass
class _Group:
    tape: _Tape
    start: int
    end: int


class Graphs:
    """The tapes of this process."""

    def __init__(self, runtime: Runtime) -> None:
        self._tape: _Tape | None = None
        self._update: tuple[_Group, list[Step]] | None = None
        self._graphs: dict[int, _Tape] = {}
        self._groups: dict[int, _Group] = {}
        runtime.listen(self._on)

    @property
    def capturing(self) -> bool:
        """Whether operators go on a tape."""
        return self._tape is not None

    @property
    def recording(self) -> bool:
        """Whether steps go on a tape, of a capture or of a task update."""
        return self._tape is not None or self._update is not None

    def run(self, step: Step) -> None:
        """Run a step now, or put it on the tape that is being captured or updated."""
        if self._update is not None:
            self._update[1].append(step)
        elif self._tape is not None:
            self._tape.steps.append(step)
        else:
            step()

    def refuse(self, operator: str, reason: str) -> None:
        """Raise while capturing.

        Raises:
            CaptureError: a capture is in progress.
        """
        if self._tape is not None:
            raise CaptureError(f"{operator} cannot be captured into a graph: {reason}")

    def _on(self, event: Event, handle: int, other: int, source: int, size: int) -> None:
        if event is Event.CAPTURE_BEGIN:
            self._tape = _Tape()
        elif event is Event.CAPTURE_END:
            if self._tape is not None and other:
                self._graphs[other] = self._tape
            self._tape = None
        elif event is Event.GRAPH_EXECUTE:
            for step in list(self._graphs[handle].steps):
                step()
        elif event is Event.GRAPH_DESTROY:
            self._graphs.pop(handle, None)
        elif event is Event.COPY:
            self.run(functools.partial(_copy, handle, source, size))
        else:
            self._on_group(event, other)

    def _on_group(self, event: Event, handle: int) -> None:
        if event is Event.GROUP_BEGIN and self._tape is not None:
            self._tape.groups.append(len(self._tape.steps))
        elif event is Event.GROUP_END and self._tape is not None:
            self._groups[handle] = _Group(self._tape, self._tape.groups.pop(), len(self._tape.steps))
        elif event is Event.UPDATE_BEGIN:
            self._update = (self._groups[handle], [])
        elif event is Event.UPDATE_END and self._update is not None:
            (group, steps), self._update = self._update, None
            if len(steps) != group.end - group.start:
                wanted = group.end - group.start
                raise CaptureError(
                    f"a task update must launch what its group launched: {wanted} operators, not {len(steps)}"
                )
            group.tape.steps[group.start : group.end] = steps


def _copy(to: int, source: int, size: int) -> None:
    ctypes.memmove(to, source, size)
