"""How long the parts of a request took."""

from __future__ import annotations

from dataclasses import dataclass

from npu_zoo.core.engine import RequestMetrics


@dataclass(frozen=True)
class RequestTimes:
    """Instants on the monotonic clock, which all processes of a machine share; None where one did not come.

    Attributes:
        arrival: when the server had the request, or the engine where nothing earlier is known.
        scheduled: when the engine took it from its queue; None too where the engine does not tell.
    """

    arrival: float
    scheduled: float | None
    first_token: float | None
    finished: float | None

    @classmethod
    def of(cls, metrics: RequestMetrics, arrival: float | None = None) -> RequestTimes:
        """Read an engine's metrics; ``arrival`` is when the server had the request."""
        first = metrics.arrival_time if arrival is None else arrival
        return cls(first, metrics.scheduled_time, metrics.first_token_time, metrics.finished_time)

    @property
    def queue(self) -> float | None:
        """Seconds before the engine began with it."""
        return seconds(self.arrival, self.scheduled)

    @property
    def prefill(self) -> float | None:
        """Seconds from there to the first token."""
        return seconds(self.scheduled, self.first_token)

    @property
    def decode(self) -> float | None:
        """Seconds from the first token to the last."""
        return seconds(self.first_token, self.finished)

    @property
    def inference(self) -> float | None:
        """Seconds from leaving the queue to the last token."""
        return seconds(self.scheduled, self.finished)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return seconds(self.arrival, self.first_token)

    @property
    def total(self) -> float | None:
        """Seconds from arrival to the last token."""
        return seconds(self.arrival, self.finished)


def seconds(start: float | None, end: float | None) -> float | None:
    """From one instant to another, never below 0; None where one is missing."""
    return None if start is None or end is None else max(end - start, 0.0)
