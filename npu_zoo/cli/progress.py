"""What stderr shows while a run is under way: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from npu_zoo.cli.results import count_tokens
from npu_zoo.core.engine import RequestOutput

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10.0


class RunProgress(AbstractContextManager["RunProgress"]):
    """Counts finished prompts and generated tokens, and shows them where there are many prompts.

    Attributes:
        tokens: output tokens so far.
        first_token_s: seconds to the first token of all; None before it.

    Args:
        timed: whether speeds mean something; those of a simulated device do not.
    """

    def __init__(self, total: int, *, timed: bool = True) -> None:
        self.total = total
        self.done = 0
        self._timed = timed
        self.first_token_s: float | None = None
        self._tokens: dict[str, int] = {}
        self._start = self._last_line = time.monotonic()
        self._end: float | None = None
        self._bar = _bar("prompts", total) if total > 1 and sys.stderr.isatty() else None

    def __enter__(self) -> RunProgress:
        self._start = self._last_line = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end = time.monotonic()
        if self._bar:
            self._bar.stop()

    @property
    def tokens(self) -> int:
        """Output tokens so far."""
        return sum(self._tokens.values())

    @property
    def seconds(self) -> float:
        """Time since the start, until the end."""
        return (self._end or time.monotonic()) - self._start

    def update(self, output: RequestOutput) -> None:
        """Take one step's output."""
        self._tokens[output.request_id] = count_tokens(output)
        self.done += output.finished
        if self.first_token_s is None:
            self.first_token_s = self.seconds
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done, speed=self._speed_text())
        elif self.total > 1 and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def summary(self) -> str:
        """What was measured, in one line."""
        many = f"{self.done} of {self.total} prompts, " if self.total > 1 else ""
        if not self._timed:
            return f"{many}{self.tokens} tokens on a simulated device, whose speed says nothing"
        first = f", first token after {self.first_token_s:.2f} s" if self.first_token_s is not None else ""
        return f"{many}{self.tokens} tokens in {self.seconds:.2f} s: {self._speed():.1f} tokens/s{first}"

    def _speed_text(self) -> str:
        return f"{self._speed():.1f} tokens/s" if self._timed else "simulated"

    def _speed(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def _line(self) -> str:
        left = self.seconds / self.done * (self.total - self.done) if self.done else None
        rest = f", {left:.0f} s left" if left is not None else ""
        return f"{self.done}/{self.total} prompts, {self._speed_text()}{rest}"


class LoadingProgress(AbstractContextManager["LoadingProgress"]):
    """A bar for loading weights that goes away when it is done; nothing off a terminal."""

    def __init__(self) -> None:
        self._bar = _bar("loading", 1) if sys.stderr.isatty() else None

    def __enter__(self) -> LoadingProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage has come."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=stage, completed=done, total=total or None, speed="")


def _bar(description: str, total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[speed]}"), TimeRemainingColumn()]
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(description, total=total, speed="")
    return bar
