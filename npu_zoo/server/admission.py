"""How much is let in: a bounded queue for all, and a rate and a number at once for each client."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from npu_zoo.protocol.errors import ApiError

_TYPICAL_SECONDS = 2.0  # of a completion, before any has been seen
_WEIGHT = 0.1  # of the newest completion in the running mean
_LONGEST_WAIT_S = 60


class AdmissionQueue:
    """Counts completions from their admission to their end, and refuses what would make the queue too long.

    Args:
        max_running: completions that the engine runs at once.
        max_waiting: completions that may wait beside them.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.admitted = 0
        self._seconds = _TYPICAL_SECONDS

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold places for a request's completions as long as the block lasts.

        Raises:
            ApiError: 429 where they are not free now, 400 where there are never as many.
        """
        if count > self.max_running + self.max_waiting:
            raise ApiError(
                400,
                f"the request asks for {count} completions, and this server takes "
                f"{self.max_running + self.max_waiting} at most; send fewer prompts or a smaller n",
                param="n",
            )
        self.check(count)
        self.admitted += count
        start = time.monotonic()
        try:
            yield
            self._seconds += _WEIGHT * (time.monotonic() - start - self._seconds)
        finally:
            self.admitted -= count

    def check(self, count: int = 1) -> None:
        """Raise the 429 that admitting as many completions would raise now."""
        if self.admitted + count <= self.max_running + self.max_waiting:
            return
        waiting = max(0, self.admitted - self.max_running)
        raise too_many(
            f"the queue is full: {waiting} completions wait, and {self.max_waiting} may",
            code="queue_full",
            retry_after=self._seconds * max(1.0, waiting / max(1, self.max_running)),
        )


class ClientLimits:
    """What a single client may do.

    Args:
        rate: requests a minute, counted over a window that moves; None for any.
        concurrency: requests at once; None for any.
    """

    def __init__(self, rate: int | None = None, concurrency: int | None = None) -> None:
        self._rate = rate
        self._concurrency = concurrency
        self._running: Counter[str] = Counter()
        if rate is not None:
            from limits import RateLimitItemPerMinute
            from limits.storage import MemoryStorage
            from limits.strategies import MovingWindowRateLimiter

            self._item = RateLimitItemPerMinute(rate)
            self._limiter = MovingWindowRateLimiter(MemoryStorage())

    @contextmanager
    def request(self, client: str) -> Iterator[None]:
        """Count a request of a client as long as the block lasts.

        Raises:
            ApiError: 429 where it is one too many.
        """
        if self._concurrency is not None and self._running[client] >= self._concurrency:
            raise too_many(
                f"{self._running[client]} requests of yours run, and {self._concurrency} may at once",
                code="concurrency_limit_exceeded",
                retry_after=1.0,
            )
        self._check_rate(client)
        self._running[client] += 1
        try:
            yield
        finally:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]

    def _check_rate(self, client: str) -> None:
        if self._rate is None or self._limiter.hit(self._item, client):
            return
        free_at = self._limiter.get_window_stats(self._item, client).reset_time
        raise too_many(
            f"{self._rate} requests a minute are yours, and this is one more",
            code="rate_limit_exceeded",
            retry_after=free_at - time.time(),
        )


def too_many(message: str, *, code: str, retry_after: float) -> ApiError:
    """A 429 that says when to try again."""
    seconds = min(_LONGEST_WAIT_S, max(1, math.ceil(retry_after)))
    return ApiError(
        429,
        f"{message}; try again in {seconds} s",
        type="rate_limit_error",
        code=code,
        headers={"Retry-After": str(seconds)},
    )
