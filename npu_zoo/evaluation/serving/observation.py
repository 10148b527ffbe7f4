"""What is seen of one request, raw: the times from which every figure can be computed again."""

from __future__ import annotations

import itertools
from typing import Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["completed", "failed", "cancelled"]
FailureKind = Literal["refused", "unreachable", "status", "closed", "time-out", "malformed", "error", "client"]
"""``refused``: nobody listens. ``unreachable``: no connection for another reason. ``status``: another HTTP status than
200. ``closed``: the connection or the stream ended before the answer did. ``malformed``: what came is no stream of
answers. ``error``: the stream held an error. ``client``: this client could not send it, whatever the server does."""


class Failure(BaseModel):
    """Why a request failed.

    Attributes:
        kind: what a program can count it by.
        message: in words; of an HTTP status with what the server said.
    """

    model_config = ConfigDict(frozen=True)

    kind: FailureKind
    message: str


class Observation(BaseModel):
    """One request. Times are seconds of a monotonic clock after the start of its level.

    Attributes:
        index: in the order of sending.
        due: when it was to be sent; None in a closed loop, where it is sent when another one ends.
        sent: when it was sent, before a connection was made.
        arrivals: when each event of the stream came that has a part of the answer, the one with its end too.
        characters: how much text each of them brought: visible, reasoning or of a tool call.
        ended: when the response, or the attempt, had ended.
        status: ``cancelled`` is what Ctrl-C ended; it is no failure of the server's.
        failure: of a failed one.
        finish_reason: what the server says ended the answer.
        asked_prompt_tokens: length that the prompt was made for; None where it was given.
        max_tokens: new tokens that were asked for; None where the server decides.
        prompt_tokens: as the server counts; None where it does not say.
        output_tokens: as the server counts, or one for each event with text where it does not say.
        counted_by_server: whether ``output_tokens`` is the server's count.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    due: float | None = None
    sent: float
    arrivals: tuple[float, ...] = ()
    characters: tuple[int, ...] = ()
    ended: float
    status: Status
    failure: Failure | None = None
    finish_reason: str | None = None
    asked_prompt_tokens: int | None = None
    max_tokens: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted_by_server: bool = False

    @property
    def lateness(self) -> float | None:
        """Seconds that it was sent after it was due; None in a closed loop."""
        return None if self.due is None else self.sent - self.due

    @property
    def text_arrivals(self) -> list[float]:
        """When events with text came."""
        return [at for at, size in zip(self.arrivals, self.characters, strict=True) if size]

    @property
    def has_text(self) -> bool:
        """Whether an event had text."""
        return any(self.characters)

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first text; to the answer's end where it has none."""
        return min(self.text_arrivals, default=self.arrivals[-1]) - self.sent if self.arrivals else None

    @property
    def e2e(self) -> float | None:
        """Seconds from sending to the last part of the answer."""
        return self.arrivals[-1] - self.sent if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None where there is only one, or no text."""
        if not self.has_text or self.ttft is None or self.e2e is None or self.output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Seconds between events with text."""
        times = self.text_arrivals
        return [later - earlier for earlier, later in itertools.pairwise(times)]
