"""Ctrl-C at moments of our choosing, so that it tears neither an engine step nor a line of output."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

Guard = Callable[[], contextlib.AbstractContextManager[None]]


class InterruptFlag:
    """Whether Ctrl-C was pressed; calling it asks."""

    def __init__(self) -> None:
        self._seen = 0
        self._waiting = False

    def __call__(self) -> bool:
        """Whether there was one."""
        return bool(self._seen)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for something outside: a Ctrl-C raises KeyboardInterrupt in it at once."""
        self._waiting = True
        try:
            if self._seen:
                raise KeyboardInterrupt
            yield
        finally:
            self._waiting = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take the signal."""
        self._seen += 1
        if self._waiting or self._seen > 1:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interrupt_flag() -> Iterator[InterruptFlag]:
    """Turn the first Ctrl-C into a flag; a second one raises KeyboardInterrupt."""
    flag = InterruptFlag()
    with _handling(flag.handle):
        yield flag


@contextlib.contextmanager
def interrupt_guard() -> Iterator[Guard]:
    """Give a context manager in which a Ctrl-C waits for the end of the block."""
    inside = pending = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        if not inside:
            raise KeyboardInterrupt
        pending = True

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        nonlocal inside
        inside = True
        try:
            yield
        finally:
            inside = False
        if pending:
            raise KeyboardInterrupt

    with _handling(handler):
        yield guard


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
