"""What bounds a case: where its time goes, told by its own figures and the machine's."""

from __future__ import annotations

from dataclasses import dataclass

from npu_zoo.evaluation.peers.engines import SUBJECT
from npu_zoo.evaluation.peers.result import CaseResult
from npu_zoo.evaluation.record import Machine


@dataclass(frozen=True)
class Bound:
    """Shares of a measured time, which make 1.

    Attributes:
        roof: ``bandwidth`` or ``operations``, whichever the floor rests on.
        floor: what the floor takes.
        host: what passes outside the model's own steps; None where it is not known.
    """

    roof: str
    floor: float
    host: float | None

    @property
    def rest(self) -> float:
        """What the model's steps take above the floor; with what the host takes, where that is not known."""
        return max(0.0, 1 - self.floor - (self.host or 0.0))

    @property
    def name(self) -> str:
        """The largest of the shares: the roof, the host, or kernels that fall short of the roof."""
        parts = {
            self.roof: self.floor,
            "host": self.host or 0.0,
            "kernels" if self.host is not None else "rest": self.rest,
        }
        return max(parts, key=lambda part: parts[part])

    @property
    def text(self) -> str:
        """The name, and the host's share beside it."""
        return f"{self.name}; host {self.host:.0%}" if self.host is not None else self.name


def bound_of(case: CaseResult, machine: Machine, engine: str = SUBJECT) -> Bound | None:
    """Where an engine's time of a case goes; None where it has no time or no floor."""
    found = case.median_of(engine)
    if (
        found is None
        or not case.work
        or not machine.bandwidth
        or not machine.peak
        or case.metric in ("memory", "cache")
    ):
        return None
    seconds = case.work.tokens / found if case.higher_is_better else found
    least = {"bandwidth": case.work.bytes / machine.bandwidth, "operations": case.work.operations / machine.peak}
    roof = max(least, key=lambda name: least[name])
    host = case.host_share(engine) if case.higher_is_better else None
    return Bound(roof, min(1.0, least[roof] / seconds), host)
