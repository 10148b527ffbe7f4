"""How much is let in: a bounded queue for all, and a rate and a number at once for each client."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from npu_zoo.protocol.errors import ApiError

_TYPICAL_SECONDS = 2.0  # of a completion, before any has been seen
_WEIGHT = 0.1  # of the newest completion in the running mean
_LONGEST_WAIT_S = 60


@dataclass
class Admission:
    """A request's places in the queue.

    Attributes:
        finished: whether its completions came to their ends, so that their time says how long others take.
    """

    finished: bool = False


class AdmissionQueue:
    """Counts completions from their admission to their end, and refuses what would make the queue too long.

    A request that is being prepared counts as one, so that the queue bounds what is read and tokenized too.

    Args:
        max_running: completions that the engine runs at once.
        max_waiting: completions that may wait beside them.

    Attributes:
        preparing: requests that are being read.
        admitted: completions that run or wait.
        seconds: that a request takes of late.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.preparing = self.admitted = 0
        self.seconds = _TYPICAL_SECONDS

    @contextmanager
    def prepare(self) -> Iterator[None]:
        """Hold a place, as long as the block lasts, for a request whose completions are not known yet.

        Raises:
            ApiError: 429 where none is free.
        """
        self._check(1)
        self.preparing += 1
        try:
            yield
        finally:
            self.preparing -= 1

    @contextmanager
    def admit(self, count: int) -> Iterator[Admission]:
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
        self._check(count)
        self.admitted += count
        start, admission = time.monotonic(), Admission()
        try:
            yield admission
        finally:
            self.admitted -= count
            if admission.finished:
                self.seconds += _WEIGHT * (time.monotonic() - start - self.seconds)

    def _check(self, count: int) -> None:
        taken = self.preparing + self.admitted
        if taken + count <= self.max_running + self.max_waiting:
            return
        waiting = max(0, taken - self.max_running)
        raise too_many(
            f"the queue is full: {waiting} completions wait, and {self.max_waiting} may",
            code="queue_full",
            retry_after=self.seconds * max(1.0, waiting / max(1, self.max_running)),
        )


class BodyRoom:
    """Bounds the bytes of all bodies that are being read and prepared.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Called with the bytes of each part of a body, it holds them as long as the block lasts.

        Raises:
            ApiError: 429 where there is no room, at the begin or for a part.
        """
        held = 0

        def hold(count: int) -> None:
            nonlocal held
            if self.taken >= self.size or self.taken + count > self.size:
                raise too_many(f"bodies of {self.taken} bytes are being read", code="queue_full", retry_after=1.0)
            self.taken += count
            held += count

        hold(0)
        try:
            yield hold
        finally:
            self.taken -= held


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
