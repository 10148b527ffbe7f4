"""What stderr shows while bytes are written or compared: tensors, the rate, and the time that is left."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType

from npu_zoo.cli.download_progress import byte_bar, size_text
from npu_zoo.cli.progress import SECONDS_BETWEEN_LINES


class ByteProgress(AbstractContextManager["ByteProgress"]):
    """A bar on a terminal, a line now and then elsewhere, and a line at the end.

    Args:
        verb: what was done at the end, such as ``written``.
    """

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._start = self._last_line = time.monotonic()
        self._first: int | None = None
        self._state = (0, 0, 0, 0)
        self._bar = byte_bar(None) if sys.stderr.isatty() else None

    def __enter__(self) -> ByteProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            _, tensors, done, _ = self._state
            seconds = time.monotonic() - self._start
            text = f"{tensors} tensors, {size_text(done)} {self._verb} in {seconds:.1f} s, {self._rate()}"
            print(text, file=sys.stderr)

    def __call__(self, tensors: int, all_tensors: int, done: int, total: int) -> None:
        """How far it has come; what is done at the first call is not counted into the rate."""
        self._first = done if self._first is None else self._first
        self._state = (tensors, all_tensors, done, total)
        now = time.monotonic()
        if self._bar:
            text = f"{tensors}/{all_tensors} tensors"
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=text)
        elif now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        tensors, all_tensors, done, total = self._state
        come, seconds = done - (self._first or 0), time.monotonic() - self._start
        left = f", {(total - done) * seconds / come:.0f} s left" if come > 0 else ""
        return f"{tensors}/{all_tensors} tensors, {size_text(done)} of {size_text(total)}, {self._rate()}{left}"

    def _rate(self) -> str:
        come = self._state[2] - (self._first or 0)
        return f"{size_text(come / max(time.monotonic() - self._start, 1e-9))}/s"
