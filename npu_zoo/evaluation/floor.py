"""How near a measured time came to the least that the machine allows."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from npu_zoo.evaluation.machine import floor_seconds
from npu_zoo.evaluation.record import Machine
from npu_zoo.evaluation.work import Work


class Floor(BaseModel):
    """The least that a phase needs, and how near it came.

    Attributes:
        bytes, operations: see :class:`npu_zoo.evaluation.work.ModelWork`.
        seconds: the least time for them on the machine as it was measured; None where it was not.
        limit: what sets that time.
        bandwidth_share, peak_share: of the machine's measured bandwidth and peak that the phase used for them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    operations: int
    seconds: float | None = None
    limit: str | None = None
    bandwidth_share: float | None = None
    peak_share: float | None = None

    @classmethod
    def of(cls, work: Work, seconds: float, machine: Machine | None) -> Floor:
        """That of a phase which took so many seconds."""
        if machine is None or machine.bandwidth is None or machine.peak is None or not seconds:
            return cls(bytes=work.bytes, operations=work.operations)
        least, limit = floor_seconds(work, machine)
        return cls(
            bytes=work.bytes,
            operations=work.operations,
            seconds=least,
            limit=limit,
            bandwidth_share=work.bytes / seconds / machine.bandwidth,
            peak_share=work.operations / seconds / machine.peak,
        )
