"""Turns drafting off where it does not pay, by the time that steps take, and tries again now and then."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

_MIN_DRAFTED, _MIN_PLAIN = 8, 4
"""Steps of each kind before they are judged."""
_WINDOW = 32
_PLAIN_EVERY = 64
"""While it drafts, one step in so many is a plain one, so that there is something to compare with."""
_MARGIN = 0.03
"""What is gained or lost by less leaves things as they are."""
_FIRST_REST, _LONGEST_REST = 128, 16384
"""Plain steps before drafting is tried again; twice as many each time that it fails."""


def batch_class(batch: int) -> int:
    """The largest batch of the class that a batch belongs to: 1, 2, 4, 8 and so on."""
    return 1 << (batch - 1).bit_length()


@dataclass
class _Meter:
    """Steps of one class of batches.

    Attributes:
        plain: seconds of a token, by step.
        drafted: seconds of a step by its sequences, and tokens by its sequences.
        rest: plain steps that are left before drafting is tried; 0 while it drafts.
        next_rest: how many they will be the next time.
        trying: whether it drafts in order to find out, after a rest.
    """

    plain: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    drafted: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    rest: int = 0
    next_rest: int = _FIRST_REST
    trying: bool = False
    since_plain: int = 0

    @property
    def gain(self) -> float | None:
        """Tokens a second with drafts, over those without; None before enough is known."""
        if len(self.plain) < _MIN_PLAIN or len(self.drafted) < _MIN_DRAFTED:
            return None
        seconds = statistics.median(seconds for seconds, _ in self.drafted)
        tokens = statistics.fmean(tokens for _, tokens in self.drafted)
        return statistics.median(self.plain) * tokens / max(seconds, 1e-12)


class SpeculationControl:
    """Decides, for each class of running batches, whether the next step drafts.

    What is compared is what steps are made for, tokens a second, of steps that had drafts and of steps that had none.
    Medians of times are taken, as the first steps of a shape and interrupted ones take much longer than the others.

    Args:
        adaptive: whether it turns anything off.
    """

    def __init__(self, *, adaptive: bool = True) -> None:
        self._adaptive = adaptive
        self._meters: dict[int, _Meter] = {}

    def wants_drafts(self, batch: int) -> bool:
        """Whether the next step, of so many sequences that each get a token, shall have drafts."""
        if not self._adaptive:
            return True
        meter = self._meter(batch)
        if meter.rest:
            return False
        compares = len(meter.drafted) >= _MIN_DRAFTED and len(meter.plain) < _MIN_PLAIN
        return not compares and meter.since_plain < _PLAIN_EVERY

    def record(self, batch: int, drafts: int, tokens: int, seconds: float) -> float | None:
        """Take a step of ``batch`` sequences that each got a token or more, and no prompt's.

        Args:
            drafts: that were verified in it.
            tokens: that the sequences got.

        Returns:
            Where this step turned drafting off, tokens a second with drafts over those without.
        """
        meter = self._meter(batch)
        if drafts:
            meter.drafted.append((seconds / batch, tokens / batch))
            meter.since_plain += 1
        else:
            meter.plain.append(seconds / batch)
            meter.since_plain = 0
        if meter.rest:
            self._wait(meter)
            return None
        return self._judge(meter) if self._adaptive else None

    @property
    def gains(self) -> dict[int, float]:
        """By class, tokens a second with drafts over those without, as far as known and not at rest."""
        found = {size: meter.gain for size, meter in sorted(self._meters.items())}
        return {size: round(gain, 3) for size, gain in found.items() if gain is not None}

    @property
    def turned_off(self) -> list[int]:
        """Classes that do not draft now."""
        return sorted(size for size, meter in self._meters.items() if meter.rest)

    def _meter(self, batch: int) -> _Meter:
        return self._meters.setdefault(batch_class(batch), _Meter())

    def _wait(self, meter: _Meter) -> None:
        meter.rest -= 1
        meter.trying = not meter.rest

    def _judge(self, meter: _Meter) -> float | None:
        gain = meter.gain
        if gain is None:
            return None
        if gain >= (1 + _MARGIN if meter.trying else 1 - _MARGIN):
            meter.trying, meter.next_rest = False, _FIRST_REST
            return None
        meter.rest, meter.trying = meter.next_rest, False
        meter.next_rest = min(2 * meter.next_rest, _LONGEST_REST)
        meter.drafted.clear()
        return gain
