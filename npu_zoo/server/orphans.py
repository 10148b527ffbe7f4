"""Processes whose parent has ended, such as the ranks of an engine: the supervisor takes them, and sees them off."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans; where it is not Linux, they stay unknown."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def orphans(known: Collection[int]) -> list[int]:
    """The children of this process that live and are not known; those that have ended are reaped."""
    return [child for child in children() - set(known) if not _reaped(child)]


def kill_orphans(known: Collection[int]) -> None:
    """End the children of this process that are not known."""
    for child in orphans(known):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def children() -> set[int]:
    """The children of this process; none where there is no /proc."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


def _reaped(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] == child
    except ChildProcessError:
        return True
