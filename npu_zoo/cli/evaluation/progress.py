"""What stderr shows of an eval: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager

from npu_zoo.cli.progress import SECONDS_BETWEEN_BARS, SECONDS_BETWEEN_LINES, LoadingProgress


class EvalProgress(AbstractContextManager["EvalProgress"]):
    """Takes a stage's name, what is done and what there is to do.

    Args:
        timed: whether speeds mean something; those of a simulated device do not.
    """

    def __init__(self, *, timed: bool = True) -> None:
        self._timed = timed
        self._stage = ""
        self._bar = LoadingProgress()
        self._start = self._shown = time.monotonic()
        self._found = 0

    def __enter__(self) -> EvalProgress:
        self._bar.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.__exit__(None, None, None)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage has come; what is done when it begins was done by an earlier run."""
        now = time.monotonic()
        if stage != self._stage or done < self._found:
            self._stage, self._found, self._start = stage, done, now
        terminal = sys.stderr.isatty()
        if done < total and now - self._shown < (SECONDS_BETWEEN_BARS if terminal else SECONDS_BETWEEN_LINES):
            return
        self._shown = now
        if terminal:
            self._bar(f"{stage}{self._speed(done, total, now)}", done, total)
        elif total:
            print(f"{stage}: {done}/{total}{self._speed(done, total, now)}", file=sys.stderr, flush=True)

    def _speed(self, done: int, total: int, now: float) -> str:
        asked, seconds = done - self._found, now - self._start
        if not self._timed or not asked or seconds <= 0:
            return ""
        rate = asked / seconds
        left = f", {(total - done) / rate:.0f} s left" if done < total else f" in {seconds:.1f} s"
        return f", {rate:.1f}/s{left}"
