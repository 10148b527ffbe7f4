"""What stderr shows while a server is measured: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from npu_zoo.cli.progress import SECONDS_BETWEEN_BARS, SECONDS_BETWEEN_LINES

if TYPE_CHECKING:
    from rich.progress import Progress

    from npu_zoo.evaluation.serving.arrivals import Load
    from npu_zoo.evaluation.serving.load import Tally


class ServeProgress(AbstractContextManager["ServeProgress"]):
    """Shows how far each level is, how fast it goes, and the time that is left."""

    def __init__(self) -> None:
        self._bar = _bar() if sys.stderr.isatty() else None
        self._name = ""
        self._start = self._last_shown = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Write a remark above the bar."""
        print(f"note: {text}", file=sys.stderr, flush=True)

    def begin(self, load: Load) -> None:
        """A level begins."""
        self._name, self._start = load.name, time.monotonic()
        self._last_shown = self._start
        if self._bar:
            self._bar.start()
            self._bar.reset(self._bar.task_ids[0], description=self._name, total=1, said="")

    def update(self, tally: Tally) -> None:
        """A request was sent, or has ended."""
        now = time.monotonic()
        done = tally.num_requests is not None and tally.ended == tally.num_requests
        wait = SECONDS_BETWEEN_BARS if self._bar else SECONDS_BETWEEN_LINES
        if now - self._last_shown < wait and not (self._bar and done):
            return
        self._last_shown = now
        seconds = now - self._start
        share = progress_share(tally, seconds)
        said = tally_text(tally, seconds)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=share, said=said)
        else:
            left = f", {seconds / share - seconds:.0f} s left" if share else ""
            print(f"{self._name}: {said}{left}", file=sys.stderr, flush=True)


def progress_share(tally: Tally, seconds: float) -> float:
    """How much of a level is done, from 0 to 1: of its requests or its time, whichever is further."""
    of_requests = tally.ended / tally.num_requests if tally.num_requests else 0.0
    of_time = seconds / tally.duration if tally.duration else 0.0
    return min(1.0, max(of_requests, of_time))


def tally_text(tally: Tally, seconds: float) -> str:
    """Requests and speeds so far."""
    total = f"/{tally.num_requests}" if tally.num_requests else ""
    failed = f", {tally.failed} failed" if tally.failed else ""
    seconds = max(seconds, 1e-9)
    speed = f"{tally.completed / seconds:.2f} requests/s, {tally.output_tokens / seconds:.1f} tokens/s"
    return f"{tally.ended}{total} of {tally.sent} sent{failed}, {speed}"


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(bar_width=20)]
    columns += [TextColumn("{task.fields[said]}"), TimeRemainingColumn()]
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=1, said="")
    return bar
