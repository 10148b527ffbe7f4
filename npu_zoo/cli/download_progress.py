"""What stderr shows while a checkpoint is downloaded."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from npu_zoo.cli.output import note
from npu_zoo.cli.progress import SECONDS_BETWEEN_LINES

if TYPE_CHECKING:
    from rich.progress import Progress

    from npu_zoo.weights.download import DownloadPlan
    from npu_zoo.weights.remote_files import RemoteFile


def size_text(count: float) -> str:
    """Bytes for people, in the powers of ten that hubs and disks are labelled with."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def count_text(files: Sequence[RemoteFile]) -> str:
    """How many files there are, with the noun."""
    return f"{len(files)} file" + ("s" if len(files) != 1 else "")


class PullProgress(AbstractContextManager["PullProgress"]):
    """Shows on stderr how far a download has come: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, plan: DownloadPlan) -> None:
        self._total, self._files = plan.size, plan.missing
        self._done = self._first = plan.resumed
        self._finished = 0
        self._lock = threading.Lock()
        self._start = self._last_line = time.monotonic()
        self._bar = byte_bar(plan.size, plan.resumed) if plan.missing and sys.stderr.isatty() else None

    def __enter__(self) -> PullProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None and self._files:
            print(f"{count_text(self._files)} downloaded and verified, {self._speed_text()}", file=sys.stderr)

    def advance(self, count: int) -> None:
        """``count`` more bytes are there, or fewer."""
        with self._lock:
            self._done += count
            self._update()

    def finish(self, file: RemoteFile) -> None:
        """A file is there."""
        with self._lock:
            self._finished += 1
            self._update()

    def note(self, text: str) -> None:
        """Something that the user should know."""
        with self._lock:
            if self._bar:
                self._bar.console.print(f"note: {text}", markup=False, highlight=False)
            else:
                note(text)

    def _update(self) -> None:
        now = time.monotonic()
        if self._bar:
            files = f"{self._finished}/{len(self._files)} files"
            self._bar.update(self._bar.task_ids[0], completed=self._done, description=files)
        elif now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        come, seconds = self._done - self._first, now - self._start
        left = f", {(self._total - self._done) * seconds / come:.0f} s left" if come > 0 else ""
        done = f"{size_text(self._done)} of {size_text(self._total)}, {self._finished}/{len(self._files)} files"
        return f"{done}, {self._speed_text()}{left}"

    def _speed_text(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{size_text(max(0, self._done - self._first) / seconds)}/s"


def byte_bar(total: int | None, done: int = 0) -> Progress:
    """A bar of bytes with their rate and the time that is left; its one task's description stands before it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    columns += [TransferSpeedColumn(), TimeRemainingColumn()]
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=total, completed=done)
    return bar
