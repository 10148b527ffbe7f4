"""What stderr shows while a run is under way: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from npu_zoo.cli.results import count_tokens
from npu_zoo.core.engine import RequestOutput

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_BARS = 0.1


class RunProgress(AbstractContextManager["RunProgress"]):
    """Counts finished prompts and generated tokens, and shows them where there are many prompts.

    Attributes:
        done: finished prompts.
        tokens: output tokens so far.
        first_token_s: seconds to the first token of all; None before it.

    Args:
        timed: whether speeds mean something; those of a simulated device do not.
        bar: whether a terminal shows a bar, and not lines.
    """

    def __init__(self, total: int, *, timed: bool = True, bar: bool = True) -> None:
        self.total = total
        self.done = self.tokens = 0
        self._timed = timed
        self.first_token_s: float | None = None
        self._drafts = DraftCount()
        self._running: dict[str, int] = {}
        self._start = self._last_shown = time.monotonic()
        self._end: float | None = None
        self._bar = progress_bar("prompts", total) if bar and total > 1 and sys.stderr.isatty() else None

    def __enter__(self) -> RunProgress:
        self._start = self._last_shown = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end = time.monotonic()
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Time since the start, until the end."""
        return (self._end or time.monotonic()) - self._start

    def update(self, output: RequestOutput) -> None:
        """Take one step's output of a prompt that is one request."""
        self.count(output)
        if output.finished:
            self.advance()

    def count(self, output: RequestOutput) -> None:
        """Count the tokens of one step's output."""
        tokens = count_tokens(output)
        self.tokens += tokens - self._running.pop(output.request_id, 0)
        if output.finished:
            self._drafts.add(output.metrics)
        else:
            self._running[output.request_id] = tokens
        if self.first_token_s is None:
            self.first_token_s = self.seconds
        self._show()

    def advance(self) -> None:
        """A prompt is finished."""
        self.done += 1
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if self.total == 1 or now - self._last_shown < (SECONDS_BETWEEN_BARS if self._bar else SECONDS_BETWEEN_LINES):
            return
        self._last_shown = now
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done, speed=self._speed_text())
        else:
            print(self._line(), file=sys.stderr, flush=True)

    def summary(self) -> str:
        """What was measured, in one line."""
        many = f"{self.done} of {self.total} prompts, " if self.total > 1 else ""
        if not self._timed:
            return f"{many}{self.tokens} tokens on a simulated device, whose speed says nothing{self._drafts.text()}"
        first = f", first token after {self.first_token_s:.2f} s" if self.first_token_s is not None else ""
        return f"{many}{self.tokens} tokens in {self.seconds:.2f} s: {self._speed_text()}{first}{self._drafts.text()}"

    def _speed_text(self) -> str:
        if not self._timed:
            return "simulated"
        seconds = max(self.seconds, 1e-9)
        prompts = f", {self.done / seconds:.2f} prompts/s" if self.total > 1 else ""
        return f"{self.tokens / seconds:.1f} tokens/s{prompts}"

    def _line(self) -> str:
        left = self.seconds / self.done * (self.total - self.done) if self.done else None
        rest = f", {left:.0f} s left" if left is not None else ""
        return f"{self.done}/{self.total} prompts, {self._speed_text()}{rest}"


class Drafted(Protocol):
    """What knows of guesses, as :class:`~npu_zoo.core.engine.RequestMetrics` does."""

    @property
    def drafts(self) -> int:
        """How often some were verified."""

    @property
    def draft_tokens(self) -> int:
        """How many they were."""

    @property
    def accepted_tokens(self) -> int:
        """How many of them were right."""


@dataclass
class DraftCount:
    """How far guesses of next tokens were right."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, metrics: Drafted) -> None:
        """Count a request that has finished, or several."""
        self.drafts += metrics.drafts
        self.draft_tokens += metrics.draft_tokens
        self.accepted_tokens += metrics.accepted_tokens

    def text(self, beginning: str = "; ") -> str:
        """The share that was accepted, and tokens by step that verified some; empty where there were none."""
        if not self.drafts:
            return ""
        share, length = self.accepted_tokens / self.draft_tokens, 1 + self.accepted_tokens / self.drafts
        return f"{beginning}{share:.0%} of {self.draft_tokens} drafts accepted, {length:.2f} tokens a step with drafts"


class LoadingProgress(AbstractContextManager["LoadingProgress"]):
    """A bar for loading weights that goes away when it is done; nothing off a terminal."""

    def __init__(self) -> None:
        self._bar = progress_bar("loading", 1) if sys.stderr.isatty() else None

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


def progress_bar(description: str, total: int) -> Progress:
    """A bar on stderr with one task, whose field ``speed`` is a text; it goes away when it stops."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[speed]}"), TimeRemainingColumn()]
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(description, total=total, speed="")
    return bar
