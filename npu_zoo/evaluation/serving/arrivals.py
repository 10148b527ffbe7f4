"""When requests are sent: an open loop, which does not wait for answers, or a closed one, which does."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Arrival = Literal["poisson", "burst"]


@dataclass(frozen=True)
class OpenLoop:
    """Requests at a rate of their own, whatever the server does.

    Attributes:
        rate: requests per second on average; infinite sends all at once.
        arrival: ``poisson`` draws the time between two requests; ``burst`` sends several at once at even times.
        burstiness: the shape of the gamma distribution that times between requests are drawn from, as in vLLM: 1 is a
            Poisson process, less comes in clumps, more is more even.
        burst_size: requests that a burst sends at once.
    """

    rate: float
    arrival: Arrival = "poisson"
    burstiness: float = 1.0
    burst_size: int = 1

    @property
    def name(self) -> str:
        """As a table names it."""
        return f"rate {self.rate:g}"

    @property
    def finite_rate(self) -> float | None:
        """The rate; None where it is infinite."""
        return None if math.isinf(self.rate) else self.rate

    def send_times(self, source: random.Random) -> Iterator[float]:
        """Seconds after the start at which each request is due, without end."""
        if math.isinf(self.rate):
            while True:
                yield 0.0
        yield from self._bursts() if self.arrival == "burst" else self._draws(source)

    def _bursts(self) -> Iterator[float]:
        number = 0
        while True:
            yield number // self.burst_size * (self.burst_size / self.rate)
            number += 1

    def _draws(self, source: random.Random) -> Iterator[float]:
        at = 0.0
        while True:
            at += source.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))
            yield at


@dataclass(frozen=True)
class ClosedLoop:
    """So many clients, each of which sends its next request when its last one has ended.

    Attributes:
        concurrency: clients.
    """

    concurrency: int

    @property
    def name(self) -> str:
        """As a table names it."""
        return f"concurrency {self.concurrency}"


Load = OpenLoop | ClosedLoop
