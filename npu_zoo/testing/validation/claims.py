"""What a plugin claims, one claim at a time, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from npu_zoo.core.errors import NpuZooError

Level = Literal["spec", "build", "run", "simulate"]
LEVELS: tuple[Level, ...] = get_args(Level)
"""From what is told by data alone to what takes a simulated device; each includes those before it."""

Status = Literal["holds", "fails", "skipped"]
Figures = Mapping[str, float | str]
"""What was measured, with the unit in the name."""

Check = Callable[[], Figures]
"""Raises what is wrong; gives what it measured. A check that runs elsewhere travels to another process."""


class ClaimFails(NpuZooError):
    """A claim does not hold; the message says what was found instead."""


class CannotTell(NpuZooError):
    """A claim cannot be judged here; the message says what is missing."""


@dataclass(frozen=True)
class Subject:
    """What a claim speaks of.

    Attributes:
        family: empty for what is no family's, such as a kernel.
        row: the number of a row of its matrix, from 1; 0 for what is no row's.
        axis: the axis, or else the field, that is to blame where the claim fails.
        name: what it is in words, such as ``kernel head_norm`` or ``33b on atlas_800i_a2 in bfloat16``.
    """

    plugin: str
    family: str = ""
    row: int = 0
    axis: str = ""
    name: str = ""

    def describe(self) -> str:
        """Family and row, or the plugin, and the name."""
        whose = f"{self.family} row {self.row}" if self.row else self.family or self.plugin
        return f"{whose}: {self.name}" if self.name else whose

    def on(self, axis: str) -> Subject:
        """The same with an axis."""
        return replace(self, axis=axis)


@dataclass(frozen=True)
class Claim:
    """One thing that a plugin says of itself.

    Attributes:
        text: the claim as a sentence without its subject, such as ``builds on 4 ranks (tp 4)``.
        apart: whether the plugin's own code runs, which may hang or take its process along.
        simulates: the product that the claim's process simulates; empty where it simulates none.
    """

    level: Level
    subject: Subject
    text: str
    check: Check = field(compare=False)
    apart: bool = False
    simulates: str = ""

    @property
    def id(self) -> str:
        """Tells it from all others of a validation."""
        return f"{self.level}: {self.subject.describe()}: {self.text}"

    def judge(self) -> Outcome:
        """Check it; whatever the check raises is what is wrong."""
        begin = time.monotonic()
        try:
            return Outcome.of(self, "holds", figures=self.check(), begin=begin)
        except CannotTell as error:
            return Outcome.of(self, "skipped", str(error), begin=begin)
        except NpuZooError as error:
            return Outcome.of(self, "fails", str(error), begin=begin)
        # A plugin is foreign code: whatever it raises, and sys.exit too, fails its claim alone.
        except (Exception, SystemExit) as error:
            return Outcome.of(self, "fails", error_text(error), begin=begin)


@dataclass(frozen=True)
class Outcome:
    """What came of a claim.

    Attributes:
        message: what is wrong, or why it cannot be told; empty where the claim holds.
        seconds: how long it took.
    """

    level: Level
    subject: Subject
    text: str
    status: Status
    message: str = ""
    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(
        cls, claim: Claim, status: Status, message: str = "", *, figures: Figures | None = None, begin: float
    ) -> Outcome:
        """The outcome of a claim whose check began at a time of ``time.monotonic``."""
        seconds = time.monotonic() - begin
        return cls(claim.level, claim.subject, claim.text, status, message, figures or {}, seconds)


def error_text(error: BaseException) -> str:
    """The kind of an error of foreign code, and what it says of itself, if it can."""
    try:
        said = str(error)
    except Exception:
        said = "its own text cannot be made"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def levels_up_to(level: Level) -> tuple[Level, ...]:
    """A level and those that it includes."""
    return LEVELS[: LEVELS.index(level) + 1]
