"""What a look at the machine finds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what it is about, such as ``driver``.
        status: ``ok``; a ``note`` to know; a ``warning`` of what may fail; a ``problem`` that will.
        message: what was found.
        advice: what to do, often a command; empty where there is nothing to do.
    """

    topic: str
    status: Status
    message: str
    advice: str = ""


def problems(findings: Iterable[Finding]) -> list[Finding]:
    """Those that will make a run fail."""
    return [finding for finding in findings if finding.status == "problem"]
