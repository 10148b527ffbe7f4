"""Ctrl-C at moments of our choosing, so that it tears neither an engine step nor a line of output."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

Guard = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag; a second one raises KeyboardInterrupt."""
    seen: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt

    with _handling(handler):
        yield lambda: bool(seen)


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
